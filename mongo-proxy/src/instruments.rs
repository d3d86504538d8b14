//! The metrics of a proxy.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use mongo_core::{
    lock::lock,
    metrics::{Counter, Gauge, Histogram, MetricsSink},
};

use crate::{
    connections::Connections,
    rules::{Access, Refused},
    session::Ended,
    wire::Malformed,
};

/// A number for who asks the proxy, and one for the metrics.
#[derive(Debug)]
pub(crate) struct Count(AtomicU64, Arc<dyn Counter>);

impl Count {
    pub(crate) fn new(sink: &dyn MetricsSink, name: &'static str, help: &'static str, labels: &[(&'static str, &str)]) -> Self {
        Self(AtomicU64::new(0), sink.counter(name, help, labels))
    }

    pub(crate) fn add_one(&self) {
        self.0.fetch_add(1, Relaxed);
        self.1.add(1);
    }

    pub(crate) fn value(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[derive(Debug)]
pub(crate) struct Instruments {
    connections: Mutex<Arc<dyn Gauge>>,
    pub(crate) turned_away: Count,
    closed: Count,
    client_failed: Count,
    server_failed: Count,
    connect_failed: Count,
    stopped: Count,
    malformed: [Count; Malformed::ALL.len()],
    /// Reads, writes, and what is neither.
    requests: [Count; 3],
    seconds: [Arc<dyn Histogram>; 2],
    refused: [Count; REFUSED.len()],
}

impl Instruments {
    pub(crate) fn new(sink: &dyn MetricsSink) -> Self {
        let outcome = |outcome: &str| {
            Count::new(sink, "mongo_proxy_connections_total", "Connections that ended, by how.", &[("outcome", outcome)])
        };
        let malformed = |malformed: Malformed| {
            let help = "What was sent and is no message, by why.";
            Count::new(sink, "mongo_proxy_malformed_total", help, &[("reason", malformed.as_str())])
        };
        let requests = |access: &str| {
            let help = "Requests, by whether they read, write or do neither.";
            Count::new(sink, "mongo_proxy_requests_total", help, &[("access", access)])
        };
        let seconds = |access: &str| {
            let help = "How long requests took that were passed on, with what they waited for rules.";
            sink.histogram("mongo_proxy_request_seconds", help, &[("access", access)], BOUNDARIES)
        };
        let refused = |reason: &str| {
            Count::new(sink, "mongo_proxy_refused_total", "Requests that were refused, by why.", &[("reason", reason)])
        };
        Self {
            connections: Mutex::new(sink.gauge("mongo_proxy_connections", "Connections of clients.", &[])),
            turned_away: outcome("turned_away"),
            closed: outcome("closed"),
            client_failed: outcome("client_failed"),
            server_failed: outcome("server_failed"),
            connect_failed: outcome("connect_failed"),
            stopped: outcome("stopped"),
            malformed: Malformed::ALL.map(malformed),
            requests: ["read", "write", "neither"].map(requests),
            seconds: ["read", "write"].map(seconds),
            refused: REFUSED.map(refused),
        }
    }

    /// Tells how many there are. One after the other, so that what is told last is what is so.
    pub(crate) fn connections(&self, connections: &Connections) {
        let gauge = lock(&self.connections);
        gauge.set(connections.number() as f64);
    }

    /// A request is over.
    pub(crate) fn request(&self, access: Option<Access>, refused: Option<&Refused>, took: Duration) {
        let [reads, writes, others] = &self.requests;
        let [read_seconds, write_seconds] = &self.seconds;
        let (count, seconds) = match access {
            Some(Access::Read) => (reads, Some(read_seconds)),
            Some(Access::Write) => (writes, Some(write_seconds)),
            None => (others, None),
        };
        count.add_one();
        match (refused, seconds) {
            (Some(refused), _) => {
                if let Some((_, count)) = REFUSED.iter().zip(&self.refused).find(|(reason, _)| **reason == refused.as_str()) {
                    count.add_one();
                }
            }
            (None, Some(seconds)) => seconds.record(took.as_secs_f64()),
            (None, None) => {}
        }
    }

    pub(crate) fn ended(&self, ended: &Ended) {
        let count = match ended {
            Ended::Closed => &self.closed,
            Ended::Client(_) => &self.client_failed,
            Ended::Server(_) | Ended::WrongReply => &self.server_failed,
            Ended::NoServer(_) => &self.connect_failed,
            Ended::Stopped => &self.stopped,
            Ended::Malformed(malformed) => {
                if let Some((_, count)) = Malformed::ALL.iter().zip(&self.malformed).find(|(known, _)| *known == malformed) {
                    count.add_one();
                }
                &self.client_failed
            }
        };
        count.add_one();
    }

    pub(crate) fn requests_ever(&self) -> u64 {
        self.requests.iter().map(Count::value).sum()
    }

    /// How many were refused, by why.
    pub(crate) fn refused(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REFUSED.into_iter().zip(self.refused.iter().map(Count::value))
    }

    /// How many messages were none, by why.
    pub(crate) fn malformed(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Malformed::ALL.into_iter().map(Malformed::as_str).zip(self.malformed.iter().map(Count::value))
    }
}

/// Of each [`Refused`].
const REFUSED: [&str; 5] = ["denied", "limited", "out_of_time", "draining", "certificate"];
const BOUNDARIES: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
