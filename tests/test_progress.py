"""Progress bars: they hand on what they count, and are silent where nobody watches."""

from qat_tricks.progress import track


def test_items_pass_one_by_one_in_order_and_nothing_is_printed(capfd):
    taken = []

    def items():
        for item in range(3):
            taken.append(item)
            yield item

    tracked = track(items(), "count")
    assert next(tracked) == 0
    assert taken == [0]  # no item is read before it is asked for
    assert list(tracked) == [1, 2]
    assert capfd.readouterr() == ("", "")
