# docker build -f docker/server.Dockerfile -t fedge-server .
# State (CA, keys, rounds, models) lives in the volume; nothing secret is in the image.
FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fedge fedge
COPY server server
COPY client client
RUN python -m venv /opt/fedge \
 && /opt/fedge/bin/pip install --no-cache-dir '.[server,sim]'

FROM python:3.13-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /var/lib/fedge fedge
COPY --from=build /opt/fedge /opt/fedge
ENV PATH=/opt/fedge/bin:$PATH \
    FEDGE_STATE=/var/lib/fedge/state \
    MPLCONFIGDIR=/tmp/matplotlib \
    ORT_DISABLE_TELEMETRY=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/fedge
VOLUME /var/lib/fedge
EXPOSE 8443
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s \
  CMD ["sh", "-c", "fedge-server status --json | grep -q '\"running\": true'"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fedge-server"]
CMD ["start"]
