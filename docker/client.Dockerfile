# docker build -f docker/client.Dockerfile -t fedge-client .
# For x86-64 and 64-bit Arm. State (device key, bundles, personal model) lives in the volume; the
# site's data are mounted read-only; nothing secret is in the image.
FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fedge fedge
COPY server server
COPY client client
RUN python -m venv /opt/fedge \
 && /opt/fedge/bin/pip install --no-cache-dir .

FROM python:3.13-slim-bookworm
RUN useradd --uid 10001 --create-home --home-dir /var/lib/fedge fedge
COPY --from=build /opt/fedge /opt/fedge
ENV PATH=/opt/fedge/bin:$PATH \
    FEDGE_STATE=/var/lib/fedge/state \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/fedge
VOLUME /var/lib/fedge
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s \
  CMD ["sh", "-c", "fedge-client status --json | grep -q '\"running\": true'"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fedge-client"]
CMD ["run"]
