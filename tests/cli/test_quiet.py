"""What is silenced, and what is not."""

import logging
import warnings

from qat_tricks.cli.quiet import quiet


def test_known_messages_are_silenced_and_others_are_not(monkeypatch):
    chatty = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(chatty, "level", logging.INFO)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet()
        warnings.warn("The 'val_dataloader' does not have many workers: 2", stacklevel=1)
        warnings.warn("the loss is not finite", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["the loss is not finite"]
    assert chatty.level == logging.WARNING  # so that warnings still pass
