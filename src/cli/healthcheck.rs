//! `healthcheck`: checks that the server on this machine is ready. It is for containers, whose
//! image has no other HTTP client.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use http_body_util::Full;
use hyper::Request;

use super::output;
use super::{Exit, GlobalArgs};
use crate::config::{Config, Flags, Purpose};
use crate::http_client::HttpClient;

/// Longest time until the answer is complete.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Limit on the bytes of an answer. Any answer of `/readyz` is smaller.
const ANSWER_LIMIT: usize = 64 << 10;

/// Check whether the server on this machine is ready
#[derive(Args)]
#[command(after_help = "Examples:
  stripe-reconciler healthcheck
  stripe-reconciler healthcheck --listen-addr 127.0.0.1:8080

It requests /readyz. Exit codes: 0 ready; 1 not ready, because the database is unavailable or the
server is stopping; 4 no answer.")]
pub struct Healthcheck {
    /// Address where serve listens [env: LISTEN_ADDR] [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR:PORT")]
    listen_addr: Option<String>,
}

impl Healthcheck {
    pub(super) async fn run(self, settings: GlobalArgs) -> anyhow::Result<Exit> {
        let config = Config::load(
            &Flags {
                listen_addr: self.listen_addr,
                ..settings.flags()
            },
            Purpose::Healthcheck,
        )?;

        let url = format!("http://{}/readyz", reachable(config.listen_addr));
        let request = Request::get(&url).body(Full::<Bytes>::default())?;

        match HttpClient::new(TIMEOUT, ANSWER_LIMIT).send(request).await {
            Ok(answer) if answer.status().is_success() => {
                output::line("ready")?;
                Ok(Exit::Done)
            }
            Ok(answer) => {
                output::note(format!("error: {url} answered {}", answer.status()));
                Ok(Exit::Refused)
            }
            Err(error) => {
                output::note(format!("error: {url} did not answer: {error}"));
                Ok(Exit::Unreachable)
            }
        }
    }
}

/// Returns the loopback address for a server that listens on all addresses.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}
