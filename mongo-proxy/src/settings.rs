//! How a proxy works.

use std::time::Duration;

use mongo_core::{Error, Result};

#[cfg(feature = "tls")]
use crate::tls::{ListenTls, UpstreamTls};
use crate::{requests::RequestLog, rules::Rules};

/// How a proxy works.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ProxySettings {
    /// The server, as `host:port`; with [`Topology::ReplicaSet`] as many members as you like, with commas between them.
    pub upstream: String,
    /// What the proxy stands before. Default: one server.
    pub topology: Topology,
    /// The host by which clients reach the proxy, for [`Topology::ReplicaSet`]. Default: the address at which it listens.
    pub advertise: Option<String>,
    /// What clients may do from the beginning on. Default: everything.
    pub rules: Rules,
    /// Which requests are logged. Default: those that are refused.
    pub request_log: RequestLog,
    /// Connections at once; who comes when there are so many is sent away. Default 10,000.
    pub max_connections: usize,
    /// How long a connection to the server may take. Default 5 s; at most a day, as all times here.
    pub connect_within: Duration,
    /// How long a message may take from its first byte on, and a second more for each 64 KiB of it that have come; the first one from the connection on. And how long a client may take no bytes, and how long
    /// a server may take for the next bytes of an answer to a client of which nothing more comes. How long an *operation* takes is not limited. Default 30 s.
    pub message_within: Duration,
    /// How long the proxy goes on when it is to stop, for requests under way, for transactions and for cursors that were used within the last so long. Default 20 s, so that
    /// it ends by itself where it is killed after 30.
    pub drain_within: Duration,
    /// What all messages under way that are larger than 64 KiB may take together: who needs it takes it once, before it is read on, and waits for it as long as `message_within`. At least 96 MiB, as the largest compressed
    /// message needs. Default 256 MiB.
    pub large_messages_bytes: usize,
    /// What clients are shown; without it they connect without TLS.
    #[cfg(feature = "tls")]
    pub listen_tls: Option<ListenTls>,
    /// How the server is known; without it it is connected to without TLS.
    #[cfg(feature = "tls")]
    pub upstream_tls: Option<UpstreamTls>,
}

impl ProxySettings {
    /// For the server at this `host:port`, with the defaults of all else.
    pub fn new(upstream: impl Into<String>) -> Self {
        Self {
            upstream: upstream.into(),
            topology: Topology::Direct,
            advertise: None,
            rules: Rules::default(),
            request_log: RequestLog::default(),
            max_connections: 10_000,
            connect_within: Duration::from_secs(5),
            message_within: Duration::from_secs(30),
            drain_within: Duration::from_secs(20),
            large_messages_bytes: 256 << 20,
            #[cfg(feature = "tls")]
            listen_tls: None,
            #[cfg(feature = "tls")]
            upstream_tls: None,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let times = [self.connect_within, self.message_within, self.drain_within];
        if times.iter().any(|time| *time > LONGEST) || self.message_within.is_zero() || self.connect_within.is_zero() {
            return Err(Error::invalid(
                "times lie between nothing and a day: correct connect_within, message_within or drain_within",
            ));
        }
        if self.max_connections == 0 {
            return Err(Error::invalid("with max_connections of 0 nobody is ever served"));
        }
        let servers: Vec<&str> = self.upstream.split(',').map(str::trim).collect();
        let is_address = |server: &str| {
            let address = server.rsplit_once(':').filter(|(host, _)| !host.is_empty() && !host.contains(['/', '@']));
            address.is_some_and(|(_, port)| port.parse::<u16>().is_ok())
        };
        if !servers.iter().copied().all(is_address) || (self.topology == Topology::Direct && servers.len() > 1) {
            let what = "upstream is the address of a server, as 127.0.0.1:27017; several with commas between them only for a replica set";
            let error = Error::invalid(what);
            // There may be a password in it.
            return Err(if self.upstream.contains('@') {
                error
            } else {
                error.with_context("got", self.upstream.escape_debug())
            });
        }
        Ok(())
    }

    /// Sets what the proxy stands before.
    #[must_use]
    pub fn with_topology(mut self, topology: Topology) -> Self {
        self.topology = topology;
        self
    }

    /// Sets the host by which clients reach the proxy.
    #[must_use]
    pub fn with_advertise(mut self, host: impl Into<String>) -> Self {
        self.advertise = Some(host.into());
        self
    }

    /// Sets what clients may do.
    #[must_use]
    pub fn with_rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    /// Sets which requests are logged.
    #[must_use]
    pub fn with_request_log(mut self, log: RequestLog) -> Self {
        self.request_log = log;
        self
    }

    /// Sets what clients are shown.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn with_listen_tls(mut self, tls: ListenTls) -> Self {
        self.listen_tls = Some(tls);
        self
    }

    /// Sets how the server is known.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn with_upstream_tls(mut self, tls: UpstreamTls) -> Self {
        self.upstream_tls = Some(tls);
        self
    }
}

/// What a proxy stands before, and what its clients see of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Topology {
    /// One server: a mongod, or a mongos. Clients connect with `directConnection=true`; or with `loadBalanced=true`, where several proxies stand behind a
    /// balancer, or cursors and transactions are to stay on their connection.
    #[default]
    Direct,
    /// A replica set: there is a listener for each of its members, and clients are told these addresses in the place of the members' own. They connect with
    /// `replicaSet=NAME`, see every member, follow elections and read from secondaries as without the proxy. Members that come later get a listener when a
    /// client hears of them first.
    ///
    /// The first listens at the address that is given, the others at the ports that follow; all at any that is free if the port is 0.
    ReplicaSet,
}

const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
