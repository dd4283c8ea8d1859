"""The benchmark of decoders: it decodes with each, and compares their pixels."""

from benchmarks import decoding


def test_decoders_take_turns_and_are_compared():
    found = decoding.measure(4, 2, "cpu")
    assert set(found["images_per_s"]) == {"opencv", "opencv, all cores", "torchvision"}
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in found["images_per_s"].values())
    off = found["difference"]["torchvision"]  # another version of the library may round in another way
    assert 0 <= off["mean"] <= off["largest"] <= 8
