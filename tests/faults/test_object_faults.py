"""Checkpoints in an object store under kills at its puts and deletes, and turned bits; `make faults KIND=objects` takes all."""

import logging

import pytest

from tests.faults import object_drill


def test_a_kill_at_any_put_or_delete_leaves_a_whole_checkpoint() -> None:
    """[F1] Every third case: before, half-way and after, on one rank and two. What is seen is whole, never older than before,
    a prune that was cut short included, and the run that goes on ends in the same bits."""
    figures = object_drill.run_kills(every=3)
    assert figures["survived"] == figures["trials"] >= 60, figures


def test_every_turned_bit_is_found(caplog: pytest.LogCaptureFixture) -> None:
    """[F12] Marker, manifest, tensors, values and facts in turn."""
    with caplog.at_level(logging.WARNING, logger="lib.train.checkpoint"):
        figures = object_drill.run_bitflips(num_trials=56, seed=1)
    assert figures["survived"] == 56 and len(figures["objects"]) == 7, figures
    assert len([record for record in caplog.records if "going back to the one before" in record.message]) == 56
