from service.archive.fields import FieldWatch


def test_a_field_that_no_stream_has_is_missed_before_any_record_comes():
    watch = FieldWatch(["cycles"], ["symbol", "seconds"])
    (words,) = watch.missing()
    assert "'symbol'" in words
    assert "seconds" in words
    assert watch.missing() == []


def test_a_key_of_a_map_is_missed_only_once_a_record_has_others():
    watch = FieldWatch(["signals"], ["features.rsii", "features.rsi", "scores.trend"])
    watch.look({"features": {}})
    assert watch.missing() == []
    watch.look({"features": {"rsi": 50.0, "atr": 1.0}})
    assert watch.missing() == [
        "--where: no record so far has a field 'features.rsii'; there are features.atr, features.rsi"
    ]
    watch.look({"features": {"rsi": 51.0}})
    assert watch.missing() == []


def test_a_field_of_one_stream_is_no_mistake_among_several():
    assert FieldWatch(["signals", "cycles"], ["symbol", "seconds", "stream"]).missing() == []
