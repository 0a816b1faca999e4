# The trainer on NVIDIA's PyTorch image, whose torch, NCCL, MPI, DALI and apex are the ones tuned for the
# hardware; nothing of the image is replaced.
#   make image
#   docker run --gpus all -v DATA:/data cosmoflow-dali --config configs/reference.yaml --data-dir /data
ARG BASE=nvcr.io/nvidia/pytorch:25.06-py3

# What has to be compiled, and what is fetched, leaves only wheels behind.
FROM ${BASE} AS wheels
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY cosmoflow_dali cosmoflow_dali
COPY pipelines pipelines
COPY preprocess preprocess
# mpi4py is built against the image's MPI; the image pins its own torch in PIP_CONSTRAINT.
RUN pip wheel --no-cache-dir --no-binary mpi4py --wheel-dir /wheels . mpi4py \
    && rm -f /wheels/torch-*.whl /wheels/nvidia_*.whl /wheels/triton-*.whl /wheels/cosmoflow_dali-*.whl

FROM ${BASE}
LABEL org.opencontainers.image.title="cosmoflow-dali" \
      org.opencontainers.image.description="A data-pipeline-first trainer for CosmoFlow, MLPerf HPC's 3D convolutional network" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && python -c "import nvidia.dali, apex, mpi4py"
WORKDIR /workspace/cosmoflow-dali
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 10000 cosmoflow \
    && mkdir --parents data runs results \
    && chown cosmoflow data runs results
USER 10000
ENV PYTHON=python
ENTRYPOINT ["python", "-m", "cosmoflow_dali.train"]
