import json
from pathlib import Path
from typing import Any

import pytest

from toppings.sampling_defaults import read_do_sample, read_sampling_defaults


def write(path: Path, **fields: Any) -> Path:
    (path / "generation_config.json").write_text(json.dumps(fields))
    return path


def test_a_checkpoint_without_the_file_has_no_defaults(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == {}


def test_fields_of_other_ways_to_generate_are_no_defaults(tmp_path: Path) -> None:
    write(tmp_path, do_sample=True, num_beams=4, eos_token_id=[1, 2], top_p=0.9, max_new_tokens=5, min_p=None)
    assert read_sampling_defaults(tmp_path) == {"top_p": 0.9, "max_tokens": 5}


def test_top_k_minus_one_is_off(tmp_path: Path) -> None:
    assert read_sampling_defaults(write(tmp_path, top_k=-1)) == {"top_k": 0}


@pytest.mark.parametrize(("fields", "is_sampled"), [({}, False), ({"do_sample": True}, True)])
def test_whether_to_sample_is_told_apart(tmp_path: Path, fields: dict[str, Any], is_sampled: bool) -> None:
    assert read_do_sample(write(tmp_path, **fields)) is is_sampled


def test_do_sample_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do_sample is 'yes'; it must be true or false"):
        read_do_sample(write(tmp_path, do_sample="yes"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"repetition_penalty": True}, "repetition_penalty is True"),
        ({"max_new_tokens": 0}, "max_tokens is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": float("inf")}, "top_k is inf"),
    ],
)
def test_a_default_out_of_range_is_named_with_its_file(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"generation_config.json: {reason}"):
        read_sampling_defaults(write(tmp_path, **fields))
