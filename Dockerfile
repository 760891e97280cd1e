# The gateway on port 8000, as a user without rights. Configuration: /etc/gateway/config.yaml and the environment.
# Without a database of its own it keeps one in /data. `docker stop` must wait longer than server.drain_seconds:
# `docker run --stop-timeout 50`.

FROM python:3.13-slim AS build
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
RUN python -m pip wheel --no-deps --wheel-dir dist . \
 && python -m venv /opt/gateway \
 && /opt/gateway/bin/pip install --no-cache-dir "$(echo dist/*.whl)[gunicorn]"

FROM python:3.13-slim
RUN useradd --system --uid 10001 --no-create-home --home-dir /data gateway \
 && install -d -o gateway -g gateway -m 700 /data
COPY --from=build /opt/gateway /opt/gateway
COPY deploy/healthcheck.py gunicorn.conf.py /opt/gateway/
COPY config.yaml /etc/gateway/config.yaml

ENV PATH=/opt/gateway/bin:$PATH GATEWAY_CONFIG=/etc/gateway/config.yaml PYTHONUNBUFFERED=1
# Relative paths begin here, so data/gateway.db lies in the volume.
WORKDIR /
VOLUME /data
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s \
    CMD ["python", "/opt/gateway/healthcheck.py", "/health/live"]
CMD ["gateway", "serve", "--host", "0.0.0.0"]
