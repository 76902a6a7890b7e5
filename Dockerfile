# syntax=docker/dockerfile:1
# Trains and adapts on an NVIDIA GPU such as a T4. The host needs its driver (525 or newer) and the
# NVIDIA container toolkit; the CUDA libraries are wheels inside the image.
#
#   docker build -t grpocem .
#   docker run --rm --gpus all -v grpocem:/data grpocem --config gpt2:tuned --workdir runs/mine
#   docker run --rm -it --gpus all -v grpocem:/data --entrypoint grpocem-adapt grpocem \
#       --workdir runs/mine --prompt "The city council"
#
# `--target serve` is the HTTP server, see docs/serving.md.
#
# The volume keeps the runs, what came from the Hugging Face Hub, and compiled programs. To use a
# folder of the host instead: --user "$(id -u):$(id -g)" -v "$PWD/data:/data".
FROM python:3.11-slim AS base

RUN useradd --uid 1000 --create-home grpocem && install -d -o grpocem -g grpocem /data

COPY . /src
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --root-user-action=ignore -c /src/requirements.lock '/src[cuda12,serve]'

ENV HF_HOME=/data/huggingface XDG_CACHE_HOME=/data/cache PYTHONUNBUFFERED=1
USER grpocem
WORKDIR /data
VOLUME /data

FROM base AS serve
EXPOSE 8000
ENTRYPOINT ["grpocem-serve", "--host", "0.0.0.0", "--keys", "keys.json"]
CMD ["--config", "tiny"]

FROM base AS train
ENTRYPOINT ["grpocem-train"]
CMD ["--config", "tiny"]
