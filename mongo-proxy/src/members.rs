//! A listener for each member of a replica set, and the addresses that clients see in the place of the members' own.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex},
};

use bson::RawDocument;
use mongo_core::{Error, Result, lock::lock};
use tokio::{net::TcpListener, sync::mpsc};

/// A listener, and the server behind it.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) listener: TcpListener,
    pub(crate) upstream: Arc<str>,
}

/// The members that are known, each with a door of its own.
#[derive(Debug)]
pub(crate) struct Members {
    /// Where the first listens; the others at the ports that follow, or at any if this is 0.
    first: SocketAddr,
    /// The host that clients see.
    host: String,
    known: Mutex<Known>,
    opened: mpsc::UnboundedSender<Door>,
}

#[derive(Debug, Default)]
struct Known {
    /// What clients see, by the member's own address.
    shown: BTreeMap<String, String>,
    ports: u16,
}

impl Members {
    pub(crate) fn new(first: SocketAddr, advertise: Option<&str>, opened: mpsc::UnboundedSender<Door>) -> Result<Self> {
        let host = match advertise {
            Some(host) => advertised(host)?,
            None if first.ip().is_unspecified() => {
                return Err(Error::invalid(
                    "clients of a replica set are told where its members are: say by which host they reach the proxy (advertise)",
                ));
            }
            None => match first.ip() {
                IpAddr::V4(address) => address.to_string(),
                IpAddr::V6(address) => format!("[{address}]"),
            },
        };
        Ok(Self { first, host, known: Mutex::default(), opened })
    }

    /// The address that clients see in the place of a member's. For one that was not there before a door is opened.
    pub(crate) fn shown(&self, member: &str) -> Option<String> {
        let member = member.to_lowercase();
        let mut known = lock(&self.known);
        if let Some(shown) = known.shown.get(&member) {
            return Some(shown.clone());
        }
        match self.open(&member, &mut known.ports) {
            Ok(shown) => {
                tracing::info!(member, shown, "a member of the replica set has a door");
                known.shown.insert(member, shown.clone());
                Some(shown)
            }
            // It is tried again when somebody hears of it next.
            Err(error) => {
                tracing::error!(member, %error, "nothing can listen for a member of the replica set: clients do not see it");
                None
            }
        }
    }

    /// All that are known, as they are called and as clients see them.
    pub(crate) fn all(&self) -> Vec<(String, String)> {
        let known = lock(&self.known);
        known.shown.iter().map(|(member, shown)| (member.clone(), shown.clone())).collect()
    }

    fn open(&self, member: &str, ports: &mut u16) -> io::Result<String> {
        let mut failed = io::Error::from(io::ErrorKind::AddrInUse);
        // A port that is somebody else's is passed over.
        while *ports < MOST_PORTS {
            let port = if self.first.port() == 0 { Some(0) } else { self.first.port().checked_add(*ports) };
            let Some(port) = port else { break };
            let bound = std::net::TcpListener::bind((self.first.ip(), port));
            match bound.and_then(|listener| listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener))) {
                Ok(listener) => {
                    *ports += 1;
                    let shown = format!("{}:{}", self.host, listener.local_addr()?.port());
                    // If nobody listens there any more, the proxy has stopped.
                    let _stopped = self.opened.send(Door { listener, upstream: member.into() });
                    return Ok(shown);
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    *ports += 1;
                    failed = error;
                }
                // As without a file handle to spare: it may be otherwise the next time.
                Err(error) => return Err(error),
            }
        }
        Err(failed)
    }
}

/// The members of which a hello speaks.
pub(crate) fn of(hello: &RawDocument) -> Vec<String> {
    let lists = ["hosts", "passives", "arbiters"].into_iter().filter_map(|key| hello.get_array(key).ok());
    lists.flatten().filter_map(|host| Some(host.ok()?.as_str()?.to_owned())).collect()
}

/// A host as it stands in an address.
fn advertised(host: &str) -> Result<String> {
    if let Ok(address) = host.trim_matches(['[', ']']).parse::<Ipv6Addr>() {
        return Ok(format!("[{address}]"));
    }
    if host.is_empty() || host.contains([':', '/', ',', '@']) || host.contains(char::is_whitespace) {
        return Err(Error::invalid("advertise is a host alone, as proxy.example").with_context("got", host.escape_debug()));
    }
    Ok(host.to_lowercase())
}

/// A replica set has 50 members at most; some may come and go.
const MOST_PORTS: u16 = 200;
