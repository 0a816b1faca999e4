# The trainer on NVIDIA's PyTorch image, whose torch, NCCL and MPI are the ones tuned for the
# hardware; nothing of the image is replaced.
#   docker build -t cosmoflow-dali .
#   docker run --gpus all -v DATA:/data cosmoflow-dali --config configs/reference.yaml --data-dir /data
ARG BASE=nvcr.io/nvidia/pytorch:25.06-py3
FROM ${BASE}

WORKDIR /workspace/cosmoflow-dali
COPY pyproject.toml README.md LICENSE ./
COPY cosmoflow_dali cosmoflow_dali
COPY pipelines pipelines
COPY preprocess preprocess
COPY configs configs
COPY benchmarks benchmarks
# torch, DALI and MPI come with the image, which pins its own torch in PIP_CONSTRAINT; mpi4py is
# built against the image's MPI.
RUN pip install --no-cache-dir --editable . mpi4py

ENTRYPOINT ["python", "-m", "cosmoflow_dali.train"]
