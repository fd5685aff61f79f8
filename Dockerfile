FROM python:3.11-slim-bookworm AS build

# An extra package index to take torch from. Left empty, torch comes from the default index, whose build for Linux brings
# the CUDA libraries along. docs/operations.md tells how to make the small image for machines without a GPU.
ARG TORCH_INDEX=""

WORKDIR /src
COPY constraints.txt .
RUN python3 -m venv /opt/cbp \
    && /opt/cbp/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c constraints.txt torch

COPY proto proto
COPY cbp cbp
COPY server server
RUN /opt/cbp/bin/pip install --no-cache-dir -c constraints.txt ./proto ./cbp "./server[postgresql,s3]" \
    && /opt/cbp/bin/pip uninstall --yes pip


FROM python:3.11-slim-bookworm

RUN useradd --no-log-init --uid 10001 --home-dir /var/lib/cbp --shell /usr/sbin/nologin cbp \
    && install --directory --owner cbp --group cbp /var/lib/cbp
COPY --from=build /opt/cbp /opt/cbp

ENV PATH=/opt/cbp/bin:$PATH \
    CBP_HOST=0.0.0.0 \
    CBP_DATA_DIR=/var/lib/cbp
USER 10001
WORKDIR /var/lib/cbp
VOLUME /var/lib/cbp
EXPOSE 50051 8080

HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('CBP_HTTP_PORT', '8080') + '/readyz', timeout=4)"]
ENTRYPOINT ["cbp-server"]
