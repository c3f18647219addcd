"""The record of a finished stage: a damaged one is never believed."""

import tiny
from verb import tiny_config

from proreflow_jax import UserError
from proreflow_jax.flow.parameterization import Parameterization
from proreflow_jax.run.stages import Done, plan_stages, read_done, write_done


def test_no_flipped_bit_of_a_record_of_done_changes_what_is_read(tmp_path):
    stage, _ = plan_stages(tiny_config(tmp_path, tmp_path), tmp_path, Parameterization("epsilon"), tiny.LATENT)
    stage.folder.mkdir()
    done = Done(6, "0123456789abcdef", "fedcba9876543210", stage.student, {"pairs.guidance": 1.0, "scale": 1})
    write_done(stage, done)
    whole = stage.done.read_bytes()
    assert read_done(stage) == done
    refused = 0
    for place in range(8 * len(whole)):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        stage.done.write_bytes(data)
        try:
            assert read_done(stage) == done, bytes(data)
        except UserError as error:
            assert "DONE.json is damaged" in str(error) and "\n" not in str(error), bytes(data)
            refused += 1
    assert refused > 0.8 * 8 * len(whole)  # the rest are blanks of the layout
