"""Writing a tokenizer with the tokens of a vocabulary plan."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.core.errors import TokenizerError
from lib.tokens.tokenizer import Tokenizer
from lib.tokens.vocab_plan import VocabPlan


def write_extended(
    tokenizer: Tokenizer,
    plan: VocabPlan,
    folder: Path,
    *,
    roles: Mapping[str, str] | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """Copy a tokenizer to `folder`, add the plan's tokens and the plan itself, and prove it by loading it.

    Args:
        roles: "eos_token", "pad_token" -> the token that takes the role, an old one or an added one.
        chat_template: in place of the tokenizer's.
    Returns: the tokenizer of `folder`: the old ids are the old tokens', each added token is one id, the planned one.
    Raises:
        TokenizerError: the plan is of another tokenizer, a token is there already, a role's token is not, or the ids come
            out otherwise.
    """
    check_additions(tokenizer, plan, roles or {})
    tokenizer.save(folder)
    added = [_added_token(token, number, special=token in plan.special) for token, number in plan.ids.items()]
    _extend(folder / "tokenizer.json", lambda values: values["added_tokens"].extend(added))
    _extend(folder / "tokenizer_config.json", lambda values: _decoder(values, added))
    _take_roles(folder, roles or {}, chat_template)
    plan.save(folder)
    found = Tokenizer.load(folder)
    wrong = [token for token, number in plan.ids.items() if found.encode(token) != [number]]
    if wrong or found.vocab_size != plan.vocab_size:
        raise TokenizerError(
            f"{folder}: the added token {wrong[0]!r} is encoded as {found.encode(wrong[0])}, planned was {plan.ids[wrong[0]]}"
            if wrong
            else f"{folder}: has {found.vocab_size} ids with the added tokens, planned were {plan.vocab_size}"
        )
    return found


def check_additions(tokenizer: Tokenizer, plan: VocabPlan, roles: Mapping[str, str]) -> None:
    """Raises TokenizerError where a tokenizer can't be extended so, as `write_extended` says."""
    if plan.base_size != tokenizer.vocab_size:
        raise TokenizerError(f"{tokenizer.folder}: has {tokenizer.vocab_size} ids, the vocabulary plan is for {plan.base_size}")
    known = tokenizer.backend.get_vocab(with_added_tokens=True)
    if there := [token for token in plan.tokens if token in known]:
        raise TokenizerError(f"{tokenizer.folder}: the token {there[0]!r} is there already; leave it out of the plan")
    for role, token in roles.items():
        if token not in known and token not in plan.tokens:
            raise TokenizerError(f"{tokenizer.folder}: {role} {token!r} is no token; add it to vocabulary.special")


def _added_token(token: str, number: int, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": token, **flags, "special": special}


def _decoder(values: dict[str, Any], added: list[dict[str, Any]]) -> None:
    """The list of added tokens in tokenizer_config.json, where it has one."""
    if "added_tokens_decoder" in values:
        values["added_tokens_decoder"] |= {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added}


def _take_roles(folder: Path, roles: Mapping[str, str], chat_template: str | None) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if roles and (folder / name).is_file():
            _extend(folder / name, lambda values: values.update(roles))
    if chat_template is not None:
        _extend(folder / "tokenizer_config.json", lambda values: values.pop("chat_template", None))
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _extend(path: Path, change: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
