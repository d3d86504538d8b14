//! Limits of which there is one for each key.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use mongo_core::{
    lock::lock,
    rate::{Rate, RateLimit},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Something for each key, of which there are not more than [`MOST_KEYS`].
#[derive(Debug)]
struct Keyed<T>(Mutex<Entries<T>>);

#[derive(Debug)]
struct Entries<T> {
    by_key: HashMap<String, T>,
    /// When it was last looked which of them nobody needs.
    swept: Duration,
}

impl<T> Keyed<T> {
    fn new() -> Self {
        Self(Mutex::new(Entries { by_key: HashMap::new(), swept: Duration::ZERO }))
    }

    /// Works with what there is for a key. Where there is no room for one more, it is what all of those share that come too late.
    fn with<R>(
        &self,
        key: &str,
        now: Duration,
        new: impl FnOnce() -> T,
        is_idle: impl Fn(&T) -> bool,
        work: impl FnOnce(&mut T) -> R,
    ) -> R {
        let mut entries = lock(&self.0);
        let entries = &mut *entries;
        if let Some(entry) = entries.by_key.get_mut(key) {
            return work(entry);
        }
        // Not for each that comes, or whoever brings ever new keys is served at the expense of all.
        if entries.by_key.len() >= MOST_KEYS && now >= entries.swept + SWEPT_EVERY {
            entries.by_key.retain(|_, entry| !is_idle(entry));
            entries.swept = now;
        }
        let key = if entries.by_key.len() < MOST_KEYS { key } else { TOO_LATE };
        work(entries.by_key.entry(key.to_owned()).or_insert_with(new))
    }
}

/// A rate for each key.
#[derive(Debug)]
pub(crate) struct Rates {
    rate: Rate,
    limits: Keyed<Arc<Mutex<RateLimit>>>,
}

impl Rates {
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, limits: Keyed::new() }
    }

    /// Takes an arrival in, and says how long it has to wait; or how long it would have to, if that is too long.
    pub(super) fn admit(&self, key: &str, now: Duration, patience: Duration) -> Result<(Duration, Turn), Duration> {
        let new = || Arc::new(Mutex::new(RateLimit::new(self.rate)));
        let limit = self.limits.with(key, now, new, |limit| lock(limit).is_rested(now), |limit| Arc::clone(limit));
        let (wait, mark) = {
            let mut limit = lock(&limit);
            (limit.admit_within(now, patience)?, limit.mark())
        };
        Ok((wait, Turn(Some((limit, mark)))))
    }
}

/// A turn at a rate. It is given back unless it was used.
#[derive(Debug)]
pub(crate) struct Turn(Option<(Arc<Mutex<RateLimit>>, Duration)>);

impl Turn {
    pub(crate) fn used(mut self) {
        self.0 = None;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some((limit, mark)) = &self.0 {
            lock(limit).give_back(*mark);
        }
    }
}

/// So many at once for each key.
#[derive(Debug)]
pub(crate) struct Slots {
    at_once: usize,
    max_waiting: usize,
    queues: Keyed<Arc<Queue>>,
}

#[derive(Debug)]
struct Queue {
    free: Arc<Semaphore>,
    waiting: AtomicUsize,
}

/// Why there is no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSlot {
    /// Too many wait already.
    Full,
    /// It took too long.
    Late,
}

impl Slots {
    pub(super) fn new(at_once: u32, max_waiting: u32) -> Self {
        let number = |number: u32| usize::try_from(number).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { at_once: number(at_once), max_waiting: number(max_waiting), queues: Keyed::new() }
    }

    fn queue(&self, key: &str, now: Duration) -> Arc<Queue> {
        let new = || Arc::new(Queue { free: Arc::new(Semaphore::new(self.at_once)), waiting: AtomicUsize::new(0) });
        let is_idle = |queue: &Arc<Queue>| Arc::strong_count(queue) == 1 && queue.free.available_permits() == self.at_once;
        self.queues.with(key, now, new, is_idle, |queue| Arc::clone(queue))
    }

    /// Takes a slot if there is one.
    pub(super) fn try_take(&self, key: &str, now: Duration) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.queue(key, now).free).try_acquire_owned().ok()
    }

    /// Takes a slot, or waits for it; and says whether it had to.
    ///
    /// # Cancel safety
    /// Who goes away has waited for nothing.
    pub(super) async fn take(
        &self,
        key: &str,
        now: Duration,
        patience: Duration,
    ) -> Result<(OwnedSemaphorePermit, bool), NoSlot> {
        let queue = self.queue(key, now);
        if let Ok(permit) = Arc::clone(&queue.free).try_acquire_owned() {
            return Ok((permit, false));
        }
        if patience.is_zero() {
            return Err(NoSlot::Late);
        }
        if queue.waiting.fetch_add(1, Relaxed) >= self.max_waiting {
            queue.waiting.fetch_sub(1, Relaxed);
            return Err(NoSlot::Full);
        }
        let place = Place(queue);
        match timeout(patience, Arc::clone(&place.0.free).acquire_owned()).await {
            Ok(Ok(permit)) => Ok((permit, true)),
            _ => Err(NoSlot::Late),
        }
    }
}

/// A place among those that wait.
struct Place(Arc<Queue>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Relaxed);
    }
}

pub(super) const MOST_KEYS: usize = 10_000;
const SWEPT_EVERY: Duration = Duration::from_secs(1);
/// No address, user or namespace has such a name.
const TOO_LATE: &str = "\0";
