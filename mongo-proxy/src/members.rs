//! A listener for each member of a replica set, and the addresses that clients see in the place of the members' own.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use mongo_core::{Error, ErrorKind, Result};
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
    /// What clients see, by the member's own address; nothing for one that nothing can listen for.
    shown: BTreeMap<String, Option<String>>,
    ports: u16,
}

impl Members {
    pub(crate) fn new(first: SocketAddr, advertise: Option<&str>, opened: mpsc::UnboundedSender<Door>) -> Result<Self> {
        let host = match advertise {
            Some(host) => host.to_lowercase(),
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
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shown) = known.shown.get(&member) {
            return shown.clone();
        }
        let shown = match self.open(&member, &mut known.ports) {
            Ok(shown) => {
                tracing::info!(member, shown, "a member of the replica set has a door");
                Some(shown)
            }
            Err(error) => {
                tracing::error!(member, %error, "nothing can listen for a member of the replica set: clients do not see it");
                None
            }
        };
        known.shown.insert(member, shown.clone());
        shown
    }

    /// All that are known, as they are called and as clients see them.
    pub(crate) fn all(&self) -> Vec<(String, String)> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.shown.iter().filter_map(|(member, shown)| Some((member.clone(), shown.clone()?))).collect()
    }

    fn open(&self, member: &str, ports: &mut u16) -> io::Result<String> {
        let mut failed = io::Error::from(io::ErrorKind::AddrInUse);
        // A port that is somebody else's is passed over.
        while *ports < MOST_PORTS {
            let port = if self.first.port() == 0 { Some(0) } else { self.first.port().checked_add(*ports) };
            *ports += 1;
            let Some(port) = port else { break };
            let bound = std::net::TcpListener::bind((self.first.ip(), port));
            match bound.and_then(|listener| listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener))) {
                Ok(listener) => {
                    let shown = format!("{}:{}", self.host, listener.local_addr()?.port());
                    // If nobody listens there any more, the proxy has stopped.
                    let _stopped = self.opened.send(Door { listener, upstream: member.into() });
                    return Ok(shown);
                }
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }
}

/// The members of which a hello speaks.
pub(crate) fn of(hello: &bson::RawDocument) -> Result<Vec<String>> {
    let mut members = Vec::new();
    for key in ["hosts", "passives", "arbiters"] {
        let Ok(hosts) = hello.get_array(key) else { continue };
        members.extend(hosts.into_iter().filter_map(|host| Some(host.ok()?.as_str()?.to_owned())));
    }
    if members.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "the server is no member of a replica set: stand before it alone (Topology::Direct)",
        ));
    }
    Ok(members)
}

/// A replica set has 50 members at most; some may come and go.
const MOST_PORTS: u16 = 200;
