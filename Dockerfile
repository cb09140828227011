# syntax=docker/dockerfile:1
# One binary on a base without a shell or a package manager, run by an unprivileged user.
#
#   docker build -t stripe-reconciler .
#   docker run -p 127.0.0.1:8080:8080 -v reconciler:/data -e STRIPE_WEBHOOK_SECRET=whsec_... stripe-reconciler

# The same Debian release as the base image below, because the binary links to its C library.
FROM rust:1-bookworm AS build
WORKDIR /build
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin stripe-reconciler \
    && install -D target/release/stripe-reconciler /image/usr/local/bin/stripe-reconciler \
    && install -d /image/data

FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /image/usr/ /usr/
# Owned by `nonroot` of the base image. SQLite's file is in the working directory unless DATABASE_URL
# names another place.
COPY --from=build --chown=65532:65532 /image/data /data
WORKDIR /data
VOLUME /data
ENV LISTEN_ADDR=0.0.0.0:8080 LOG_FORMAT=json
EXPOSE 8080
USER 65532:65532
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["stripe-reconciler", "healthcheck"]
ENTRYPOINT ["stripe-reconciler"]
CMD ["serve"]
