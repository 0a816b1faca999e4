# The trainer on NVIDIA's PyTorch image, whose torch, NCCL, MPI, DALI and apex are the ones tuned for the
# hardware; nothing of the image is replaced.
#   make image
#   docker run --gpus all -v DATA:/data -v RUNS:/runs cosmoflow-dali --config configs/reference.yaml \
#       --data-dir /data --run-dir /runs/first
# The trainer needs torch 2.9.1; this image has 2.10.
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3

# What takes long to compile leaves only a wheel behind: mpi4py, against the image's MPI.
FROM ${BASE} AS wheels
RUN pip wheel --no-cache-dir --no-deps --no-binary mpi4py --wheel-dir /wheels mpi4py

FROM ${BASE}
LABEL org.opencontainers.image.title="cosmoflow-dali" \
      org.opencontainers.image.description="A data-pipeline-first trainer for CosmoFlow, MLPerf HPC's 3D convolutional network" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /workspace/cosmoflow-dali
COPY . .
# pip leaves what the image has as it is, torch among it, and brings what is missing.
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-build-isolation /wheels/*.whl --editable . \
    && python -c "import nvidia.dali, apex, mpi4py, torch; torch.backends.cuda.matmul.fp32_precision" \
    && useradd --create-home --uid 10000 cosmoflow \
    && mkdir --parents data runs results \
    && chown cosmoflow data runs results
USER 10000
# Packages in a home that is mounted must not hide those of the image.
ENV PYTHON=python PYTHONNOUSERSITE=1
ENTRYPOINT ["python", "-m", "cosmoflow_dali.train"]
