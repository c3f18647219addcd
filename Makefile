# make demo: set up and run the main job.   make test: set up and run the tests.   Both start from a bare clone.
PYTHON ?= python3
BIN := .venv/bin
RUN := JAX_PLATFORMS=cpu $(BIN)/python
CONFIG ?= configs/emoji.py
FORM ?= quick

.PHONY: demo test test-slow reliability test-aot same-everywhere reproduce check-export base lint clean
demo: .venv/demo.ok
	$(RUN) -m proreflow_jax.distill --config=$(CONFIG)
	$(RUN) -m proreflow_jax.evaluate --config=$(CONFIG)
	@printf '\n%s\n' 'Next, after  . .venv/bin/activate' \
	    '  proreflow sample --prompt="a penguin, noto style" --out=penguin.png       # your prompt, by the 2-window student' \
	    '  proreflow export --stage=4 --form=single-file --dtype=float16             # a file for ComfyUI and A1111' \
	    '  proreflow sample --config=finetune --config.model.path=MY.safetensors --stage=0 --steps=25 --guidance=7   # your model'

test: .venv/test.ok
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/test.ok .venv/plan.ok
	$(RUN) -m pytest -m slow

# Kills, damages, bad inputs, an hour of saves: docs/reliability.md has the counts. Hours; RELIABILITY_SEED=... repeats a run.
reliability: .venv/test.ok
	$(RUN) -m pytest -m reliability

# SD 1.5 and SDXL at full size through the TPU compiler; 16 GB, three hours on two cores.
test-aot: .venv/test.ok .venv/plan.ok
	$(RUN) -m pytest -m aot -s tests/test_full_size_aot.py

# The same numbers on any mesh, and the same bits in one process and several (an hour).
same-everywhere: .venv/test.ok
	$(RUN) -m pytest -m 'slow or not slow' tests/test_runtime_mesh.py tests/test_runtime_processes.py tests/test_mesh_equality.py \
	    tests/test_verbs_pod.py

# The paper's methods at equal compute; FORM=full takes hours.
reproduce: .venv/demo.ok
	$(RUN) -m proreflow_jax.reproduce --config=configs/reproduce.py:$(FORM) --workers=2

# Replay the demo's exports in stock diffusers (torch; after `make demo`).
check-export: .venv/test.ok
	for n in 8 4 2; do $(RUN) -m proreflow_jax.export --config=$(CONFIG) --stage=$$n --check || exit 1; done

# Train the smallest base model again (about half an hour); compare before replacing proreflow_jax/assets/digits.
base: .venv/demo.ok
	$(RUN) -m proreflow_jax.pretrain --config=configs/digits_base.py --out=runs/base

lint: .venv/test.ok
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf runs/emoji

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

# Two reference implementations of the FID network are read by tests; they ask for torchvision, which they do not need there.
.venv/%.ok: setup.py tests/constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -c tests/constraints.txt -e '.[$*]'
	$(if $(filter test,$*),$(BIN)/python -m pip install --quiet --no-deps torch-fidelity==0.4.0 pytorch-fid==0.3.0)
	touch $@
