# Two commands for a fresh machine: `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
OUT ?= out
BIN := $(VENV)/bin
# A folder `kernels/` in the current directory must not shadow the package of that name (diffusers imports it).
export PYTHONSAFEPATH = 1

.PHONY: demo test test-slow fuzz lint gate baselines detection emoji-wan study study-layer study-peers clean
.PHONY: robust robust-peers edge-steps papers
.PHONY: bench bench-kernels bench-static bench-scaling bench-onnx onnx-formats lora-training

demo: $(VENV)/eval.done
	$(BIN)/quantdit calibrate --model fashion-dit --bits w4a8 --output $(OUT)/fashion-dit-w4a8 --overwrite
	$(BIN)/quantdit inspect $(OUT)/fashion-dit-w4a8 --plot $(OUT)/fashion-dit-w4a8-layers.png
	$(BIN)/quantdit evaluate fashion-dit $(OUT)/fashion-dit-w4a8 --samples 64 --output $(OUT)/fashion-dit-w4a8-drift

# A process for each core, each with one thread: threads that wait for each other spin.
test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal

# What is left out of it for its time.
test-slow: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist worksteal -m slow

# Every file that we read, damaged in 20,000 ways: about twenty minutes. `make test` makes a few hundred of them.
fuzz: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --output reports/fuzz.jsonl

# Types are checked in a copy as `pip install` makes it, where calibration/, kernels/ and exporters/ are inside quantdit/.
lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types
	$(BIN)/python -c "from setuptools import setup; setup()" -q build_py --build-lib build/types
	$(BIN)/basedpyright

# The embedded models quantized with little data, and held against their baselines, as a project that ships a quantized model would:
# about a minute on two cores (make -j2 gate). Fails where quantdit gate says fail (1) or inconclusive (3).
GATED := fashion-dit emoji-wan
CALIBRATE_fashion-dit := --samples 8 --steps 6
EVALUATE_fashion-dit := --samples 20 --steps 4 --probes 10
CALIBRATE_emoji-wan := --samples 4 --steps 4
EVALUATE_emoji-wan := --samples 8 --steps 3 --probes 4
gate: $(GATED:%=gate-%)

gate-%: $(OUT)/gate/%-w4a8
	$(BIN)/quantdit evaluate $* $< $(EVALUATE_$*) --output $(OUT)/gate/$*
	$(BIN)/quantdit gate $(OUT)/gate/$*/report.json --baseline reports/baselines/$*-w4a8.json --summary $(OUT)/gate/$*.md

# After a change that is meant to change them; the margins in the files stay. Say why in the commit.
baselines: $(GATED:%=baseline-%)

baseline-%: $(OUT)/gate/%-w4a8
	$(BIN)/quantdit evaluate $* $< $(EVALUATE_$*) --noise-floor --output $(OUT)/gate/$*
	$(BIN)/quantdit gate $(OUT)/gate/$*/report.json --baseline reports/baselines/$*-w4a8.json --update-baseline

# Never kept: the code may have changed.
.PHONY: $(GATED:%=$(OUT)/gate/%-w4a8)
$(GATED:%=$(OUT)/gate/%-w4a8): $(OUT)/gate/%-w4a8: $(VENV)/eval.done
	$(BIN)/quantdit calibrate --model $* --bits w4a8 $(CALIBRATE_$*) --output $@ --overwrite

# How often the gate catches damage: 20 times eight cases of two models, some twenty-five minutes. Keeps the rows that are there.
detection: $(GATED:%=$(OUT)/gate/%-w4a8)
	$(BIN)/python reports/gate/detection.py $^

bench: $(VENV)/test.done
	$(BIN)/quantdit bench cpu --output reports/bench/cpu-linear.jsonl

# How far exported graphs are from PyTorch, in every kind of recipe. Rows that are there are kept.
onnx-formats: $(VENV)/test.done
	$(BIN)/python reports/onnx_formats.py

# Exported graphs in ONNX Runtime, and other quantizers' of the same models, on two free cores.
bench-onnx: $(VENV)/test.done
	$(BIN)/quantdit bench onnx --output reports/bench/onnx.jsonl

# On a machine with a CUDA GPU, within eight minutes; CONSTRAINTS= takes a torch that sees it.
bench-kernels: $(VENV)/test.done
	$(BIN)/quantdit bench kernels --output reports/bench/kernels.jsonl --write-crossover

# Every Triton kernel for every architecture, compiled without a GPU.
bench-static: $(VENV)/test.done
	$(BIN)/python reports/bench/static.py

# The embedded video model quantized: figures, a sheet of frames, the clips moving. About an hour.
emoji-wan: $(VENV)/eval.done
	$(BIN)/python reports/emoji_wan.py

# 16-bit activations on the first and the last steps: PSNR, flickering, cost. About an hour; rows that are there are kept.
edge-steps: $(VENV)/eval.done
	$(BIN)/python reports/edge_steps.py

# A LoRA trained on the embedded video model, quantized and dequantized. Some minutes.
lora-training: $(VENV)/test.done
	$(BIN)/python reports/lora_training.py

# Hours: calibrations of 0.3, 1.3 and 14 billion weights, made up. Keeps the rows that are there.
bench-scaling: $(VENV)/eval.done
	$(BIN)/python reports/bench/scaling.py

# Hours on two cores; rows that are there are kept, so an interrupted run goes on where it was.
study: $(VENV)/eval.done
	$(BIN)/python reports/study/measure.py --floor --output reports/study/floor.jsonl
	$(BIN)/python reports/study/methods.py --output reports/study/quantdit.jsonl
	$(BIN)/python reports/study/render.py

# LRQ-DiT and VQ4DiT part by part, an hour or two; QUICK=--quick for few samples. Rows that are there are kept.
papers: $(VENV)/eval.done
	$(BIN)/python reports/papers.py $(QUICK)

# Weight codes on one layer of Wan's shape, and other packages' in environments of their own. Rows that are there are kept.
LAYER_PEERS := orbitquant sdnq hqq bitsandbytes torchao
study-layer: $(VENV)/eval.done $(LAYER_PEERS:%=.venv-peers/%/peer.done)
	$(BIN)/python reports/study/wan_layer.py
	for peer in $(LAYER_PEERS); do .venv-peers/$$peer/bin/python reports/study/wan_layer.py --peer $$peer || exit 1; done

# Other packages on the embedded model, each in an environment of its own. One that fails leaves rows that say so; rows that
# are in $(OUT)/study already are kept, so an interrupted run goes on where it was.
PEERS ?= orbitquant sdnq auto-round hqq quanto bitsandbytes torchao
study-peers: $(VENV)/eval.done
	-$(MAKE) --keep-going $(PEERS:%=peer-%)
	$(BIN)/python reports/study/measure.py $(PEERS:%=$(OUT)/study/%) --output reports/study/peers.jsonl
	$(BIN)/python reports/study/render.py

peer-%: $(VENV)/eval.done
	test -e .venv-peers/$*/peer.done || $(MAKE) .venv-peers/$*/peer.done \
		|| $(BIN)/python reports/study/peers.py $* --not-installed --output $(OUT)/study/$*
	test ! -e .venv-peers/$*/peer.done || .venv-peers/$*/bin/python reports/study/peers.py $* --output $(OUT)/study/$*

# The presets on models with planted outliers. Hours on two cores; rows that are there are kept, and models in $(OUT)/robust.
robust: $(VENV)/eval.done
	$(BIN)/python reports/robust.py --work $(OUT)/robust

# Other packages on some of these models, each in its environment of study-peers. One that cannot be installed has no rows.
ROBUST_PEERS ?= orbitquant sdnq auto-round
ROBUST_MODELS ?= channels-x-245 massive_tokens-x-1000 timesteps-x-245 feed_forward-x-245
ROBUST_METHODS := 'w4a8 gptq' 'w4a8 nearest' 'w4a8 uint4 g64 u8 matmul hadamard' 'w4a16 uint4 g64 u8 svd 32' 'w4a16 g64'
robust-peers: $(VENV)/eval.done
	$(BIN)/python reports/robust.py --work $(OUT)/robust --plant --only fashion-dit
	-$(MAKE) --keep-going $(foreach model,$(ROBUST_MODELS),$(ROBUST_PEERS:%=robust-peers/$(model)/%))
	$(BIN)/python reports/robust.py --work $(OUT)/robust --peers

robust-peers/%: $(VENV)/eval.done
	test -e .venv-peers/$(*F)/peer.done || $(MAKE) .venv-peers/$(*F)/peer.done
	.venv-peers/$(*F)/bin/python reports/study/peers.py $(*F) --match $(ROBUST_METHODS) \
		--model $(OUT)/robust/models/fashion-dit-$(*D) --work $(OUT)/robust/peers/fashion-dit-$(*D) \
		--output $(OUT)/robust/peers/fashion-dit-$(*D)/$(*F)

clean:
	rm -rf $(VENV) $(OUT)

# constraints.txt pins torch to the CPU build that development uses; set CONSTRAINTS= to install the newest of everything.
CONSTRAINTS ?= -c constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/eval.done: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[eval,plot,fast]'
	touch $@

$(VENV)/test.done: setup.cfg constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[eval,plot,test]'
	touch $@

.venv-peers/%/peer.done: setup.cfg constraints.txt | $(VENV)/eval.done
	$(PYTHON) -m venv .venv-peers/$*
	.venv-peers/$*/bin/pip install --quiet --disable-pip-version-check $(CONSTRAINTS) . \
		$$($(BIN)/python reports/study/peers.py $* --pins)
	touch $@
