import pytest

from qat_tricks.jobs.guideline_data import train_batches
from tests.helpers.lit import Data, loader


@pytest.mark.parametrize(
    ("settings", "batches"),
    [({}, 4), ({"limit_train_batches": 3}, 3), ({"limit_train_batches": 0.5}, 2)],
    ids=str,
)
def test_an_epoch_has_as_many_batches_as_the_trainer_takes(settings, batches):
    assert train_batches(loader(64), settings) == batches
    assert train_batches(Data(), settings) == batches


def test_a_stream_has_no_known_length_unless_it_is_limited():
    def stream():
        yield from loader(64)

    assert train_batches(stream(), {}) is None
    assert train_batches(stream(), {"limit_train_batches": 3}) == 3
