# docker build -t perpd . && docker run --rm perpd run --cycles 10
# The base must carry Python 3.11 or newer and glibc: the locked wheels and the allocator settings below need it.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/perpd
WORKDIR /src
# The dependencies first: a change of our code leaves this layer alone. Wheels only, so nothing is compiled.
COPY requirements.lock ./
RUN /opt/perpd/bin/pip install --require-hashes --only-binary :all: -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
RUN /opt/perpd/bin/pip install --no-deps . && /opt/perpd/bin/pip uninstall --yes setuptools pip

FROM ${BASE}
# A fixed uid, so that files on a volume keep their owner from one image to the next.
RUN groupadd --gid 10001 perpd \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin perpd \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
COPY --from=build /opt/perpd /opt/perpd
COPY config /opt/perpd/config
# The allocator reads its settings before any of our code runs: two arenas, and freed memory goes back to the
# system early. glibc by default kept 17 times as much after a burst of threads, and memory is billed by the minute.
ENV MALLOC_ARENA_MAX=2 \
    MALLOC_TRIM_THRESHOLD_=131072 \
    PATH=/opt/perpd/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONFAULTHANDLER=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
# With no data directory set, perpd keeps its data below the working directory. Mount a volume here (Railway names
# its mount in RAILWAY_VOLUME_MOUNT_PATH, mounts it as root and so needs RAILWAY_RUN_UID=0). There is no VOLUME
# instruction because Railway refuses images that have one.
WORKDIR /data
STOPSIGNAL SIGTERM
# Exec form: perpd itself is process 1 and receives SIGTERM.
ENTRYPOINT ["perpd"]
CMD ["run"]
