"""Progressive reflow of the digits' MMDiT, a rectified flow, in 8, 4, then 2 windows: does the method hold beyond UNets?

    proreflow pretrain --config=digits_flow_base --out=runs/digits_flow_model
    proreflow distill --config=digits_flow

configs/digits.py for another base model: what is not said here is as there. Machine: a laptop (2 CPU cores). The table has the
digits' columns, and distances of either model are to its own many-step result. Time on two cores
beside other work: 767 seconds and the table 79 (pairs 3 x 1,024 x 32 forwards, 1,500 updates of 0.3 seconds, compiling).
"""

from ml_collections import ConfigDict

from configs.common import optimizer
from configs.digits import get_config as digits


def get_config() -> ConfigDict:
    """What was decided for the flow; the rest is the digits' own."""
    c = digits()
    c.name = "digits_flow"  # run folder below `root`
    c.model.path = "runs/digits_flow_model"  # diffusers folder, as pretrain wrote it
    c.student.prediction = "velocity"  # of a flow the only prediction type: its output is the velocity already
    c.pairs.solver = "euler"  # of the flow's teacher: stock FlowMatchEuler
    c.pairs.steps = 4  # solver steps per window of the flow's teacher in the first stage [paper]
    c.pairs.examples = 1024  # records a stage; each holds a whole trajectory
    c.train.batch = 32  # examples per update: half of the UNet's, whose step is a third as dear
    c.optimizer = optimizer(learning_rate=5e-4, warmup_steps=20)  # half of the UNet's: attention takes less
    return c
