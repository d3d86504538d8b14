//! What the server says of its own load.

use std::{fmt, time::Duration};

use crate::{limit::whole, schedule::Access};

/// Tells how busy a server is, as somebody else finds out: a monitor of the host's, or the host itself.
///
/// A [`Manager`](crate::Manager) asks four times a second at most, and only while it has work. The answer should be at hand: it is awaited by whoever begins or ends an operation.
///
/// ```
/// use std::{sync::Arc, time::Duration};
/// use mongo_workload::{Load, ManagerSettings};
///
/// // From whatever watches the server, as the snapshot of a `mongo_monitor::Monitor`.
/// let signal = || {
///     let mut load = Load::default();
///     load.dirty_cache = 0.04;
///     load.lag = Duration::from_secs(1);
///     Some(load)
/// };
/// let settings = ManagerSettings::default().with_load_signal(Arc::new(signal));
/// ```
pub trait LoadSignal: Send + Sync + 'static {
    /// How busy the server is now. `None` if that is not known, or what is known is old: nothing is changed for it then.
    fn load(&self) -> Option<Load>;
}

impl<F: Fn() -> Option<Load> + Send + Sync + 'static> LoadSignal for F {
    fn load(&self) -> Option<Load> {
        self()
    }
}

impl fmt::Debug for dyn LoadSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LoadSignal")
    }
}

/// How busy a server is. What is not known stays at its default, which changes nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Load {
    /// Of reads: `queues.execution.read` of `serverStatus` since 8.0, `wiredTiger.concurrentTransactions.read` and `globalLock.currentQueue.readers` before.
    pub read_tickets: Tickets,
    /// Of writes, likewise.
    pub write_tickets: Tickets,
    /// How much of the cache is not yet written out, from 0 to 1: `tracked dirty bytes in the cache` by `maximum bytes configured`.
    pub dirty_cache: f64,
    /// How far the slowest secondary that counts is behind.
    pub lag: Duration,
}

/// What a server lets in at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tickets {
    /// Operations that have one.
    pub out: u32,
    /// Operations that wait for one.
    pub waiting: u32,
}

impl Tickets {
    /// So many operations have a ticket and so many wait for one.
    pub fn new(out: u32, waiting: u32) -> Self {
        Self { out, waiting }
    }
}

impl Load {
    /// Of so many slots, how many to use under this load: no more than operations have tickets while others wait for one; fewer from a dirty cache of 15 percent on
    /// (the server makes its clients write it out at 20), for writes also when secondaries lag more than ten seconds; never less than three tenths for that.
    pub(crate) fn allows(&self, access: Access, slots: u32) -> u32 {
        let tickets = match access {
            Access::Read => self.read_tickets,
            Access::Write => self.write_tickets,
        };
        let mut share = 1.0_f64;
        if self.dirty_cache > 0.15 {
            share = share.min(1.0 - (self.dirty_cache - 0.10) / 0.10);
        }
        if access == Access::Write && self.lag > LAG {
            share = share.min(LAG.as_secs_f64() / self.lag.as_secs_f64());
        }
        let mut allowed = whole(f64::from(slots) * share.max(0.3));
        if tickets.waiting > 0 && tickets.out > 0 {
            allowed = allowed.min(tickets.out);
        }
        allowed.max(1)
    }
}

const LAG: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_says_takes_slots_away_and_nothing_known_takes_none() {
        let allows = |change: fn(&mut Load)| {
            let mut load = Load::default();
            change(&mut load);
            (load.allows(Access::Read, 100), load.allows(Access::Write, 100))
        };
        assert_eq!(allows(|_| {}), (100, 100));
        assert_eq!(allows(|load| load.read_tickets = Tickets::new(7, 1)), (7, 100));
        assert_eq!(allows(|load| load.write_tickets = Tickets::new(7, 0)), (100, 100), "nobody waits for one");
        assert_eq!(allows(|load| load.write_tickets = Tickets::new(0, 9)), (100, 100), "as before a server's first second");
        assert_eq!(allows(|load| load.dirty_cache = 0.14), (100, 100));
        assert_eq!(allows(|load| load.dirty_cache = 0.16), (40, 40));
        assert_eq!(allows(|load| load.dirty_cache = 0.9), (30, 30));
        assert_eq!(allows(|load| load.dirty_cache = f64::NAN), (100, 100));
        assert_eq!(allows(|load| load.lag = Duration::from_secs(20)), (100, 50));
        assert_eq!(allows(|load| load.lag = Duration::from_secs(1000)), (100, 30));
        assert_eq!(Load { dirty_cache: 1.0, ..Load::default() }.allows(Access::Read, 1), 1);
    }
}
