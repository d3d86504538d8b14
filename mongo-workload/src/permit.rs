//! Slots: given, waited for, and given back whatever happens.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use mongo_core::{Error, ErrorKind, Result};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    class::{Class, ClassIndex},
    cost::{ShapeKey, micros},
    instruments::RefusedFor,
    manager::{Inner, Limits, State},
    schedule::{Access, Begun, Refusal, Request, WaitingId},
    submission::Submission,
};

/// A slot. Dropping it gives it to the next.
#[derive(Debug)]
#[must_use]
pub struct Permit {
    inner: Arc<Inner>,
    /// None when somebody else has taken it over.
    held: Option<Held>,
    deadline: Instant,
}

#[derive(Debug)]
struct Held {
    begun: Begun,
    shape: ShapeKey,
    since: Instant,
}

/// Who waits for a slot. Dropping it gives up its place.
#[derive(Debug)]
pub(crate) struct Place {
    inner: Arc<Inner>,
    id: WaitingId,
    class: ClassIndex,
    access: Access,
    pub(crate) deadline: Instant,
}

/// Where to tell who waits that its turn has come.
#[derive(Debug)]
pub(crate) struct Waiter {
    shape: ShapeKey,
    deadline: Instant,
    tell: oneshot::Sender<Permit>,
}

/// What becomes of who wants to begin.
pub(crate) enum Entry {
    Begun(Permit),
    Waits(Place, oneshot::Receiver<Permit>),
}

impl Permit {
    /// How long it waited.
    pub fn waited(&self) -> Duration {
        self.held.as_ref().map(|held| held.begun.waited).unwrap_or_default()
    }

    /// What its operation is to keep to.
    pub fn limits(&self) -> Limits {
        self.limits_of(1)
    }

    pub(crate) fn limits_of(&self, attempt: u32) -> Limits {
        let class = self.class();
        Limits {
            comment: format!("mongo-workload class={} attempt={attempt}", class.name),
            class: class.name.clone(),
            // A server takes 0 for no limit at all.
            max_time: self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)),
            batch_size: class.batch_size,
            attempt,
        }
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// As dropping it, but nothing is to be learned from how long it was held.
    pub(crate) fn give_back_unused(mut self) {
        if let Some(held) = self.held.take() {
            self.inner.release(held, None);
        }
    }

    fn class(&self) -> &Class {
        self.inner.class(self.held.as_ref().map_or(ClassIndex(0), |held| held.begun.request.class))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            let took = held.since.elapsed();
            self.inner.release(held, Some(took));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut told = Told::default();
        {
            let mut state = self.inner.state();
            // If its turn has come in the meantime, the permit that nobody receives gives the slot back.
            if !state.scheduler.withdraw(self.id, self.class, self.access) {
                return;
            }
            state.waiting.remove(&self.id);
            // It may have stood before something smaller.
            self.inner.begin_all(&mut state, None, &mut told);
            told.counts(&mut state, self.class);
        }
        self.inner.deliver(told);
    }
}

impl Inner {
    /// Begins an operation or lets it wait.
    pub(crate) fn enter(self: &Arc<Self>, submission: &Submission, class: ClassIndex, allowed: Duration) -> Result<Entry> {
        let deadline = Instant::now() + allowed;
        let mut told = Told::default();
        let entry = {
            let mut state = self.state();
            let entry = match self.arrive(&mut state, submission, class, allowed) {
                Ok((id, shape)) => match self.begin_all(&mut state, Some(id), &mut told) {
                    Some(begun) => {
                        let held = Some(Held { begun, shape, since: Instant::now() });
                        Ok(Entry::Begun(Permit { inner: Arc::clone(self), held, deadline }))
                    }
                    None => {
                        let (tell, receiver) = oneshot::channel();
                        state.waiting.insert(id, Waiter { shape, deadline, tell });
                        let place = Place { inner: Arc::clone(self), id, class, access: submission.access, deadline };
                        Ok(Entry::Waits(place, receiver))
                    }
                },
                Err(refused) => Err(refused),
            };
            told.counts(&mut state, class);
            entry
        };
        self.deliver(told);
        entry.map_err(|(reason, error)| {
            if let Some(instruments) = self.instruments.of(class.0) {
                instruments.refused(reason);
            }
            error.with_context("class", &self.class(class).name)
        })
    }

    /// Lets an operation wait, unless it is refused.
    fn arrive(
        &self,
        state: &mut State,
        submission: &Submission,
        class: ClassIndex,
        allowed: Duration,
    ) -> Result<(WaitingId, ShapeKey), (RefusedFor, Error)> {
        let now = self.now();
        let Submission { access, memory_bytes, .. } = *submission;
        // Not its own cost: who is taken for too dear once would never be let in to show that it is not.
        if state.scheduler.expected_wait(class, access) > micros(allowed) {
            let message = "so much of its class waits that its turn would not come in time: submit less, or allow more time";
            return Err((RefusedFor::Deadline, Error::new(ErrorKind::Unavailable, message)));
        }
        let shape = state.costs.key(class, access, &submission.shape);
        let request = Request { class, access, cost: state.costs.expected(shape), memory_bytes };
        let id = state.scheduler.arrive(now, request).map_err(|refusal| match refusal {
            Refusal::QueueFull => {
                let message = "too much of its class waits already: submit less, or raise max_queued";
                (RefusedFor::Queue, Error::new(ErrorKind::Unavailable, message))
            }
            Refusal::TooLarge => {
                let message = "the operation needs more memory than its class may ever have: raise max_memory_bytes";
                (RefusedFor::Memory, Error::new(ErrorKind::InvalidInput, message))
            }
        })?;
        // Last, as it is counted.
        if let Some(Some(rate)) = state.rates.get_mut(class.0)
            && let Err(wait) = rate.admit(now)
        {
            state.scheduler.withdraw(id, class, access);
            let error = Error::new(ErrorKind::Unavailable, "work of this class comes more often than its rate allows");
            return Err((RefusedFor::Rate, error.with_context("welcome again in ms", wait.as_millis() + 1)));
        }
        Ok((id, shape))
    }

    pub(crate) fn set_slots(self: &Arc<Self>, access: Access, slots: NonZeroU32) {
        self.state().scheduler.set_limit(access, slots.get());
        self.begin_what_may();
    }

    /// Begins what may begin by now.
    pub(crate) fn begin_what_may(self: &Arc<Self>) {
        let mut told = Told::default();
        self.begin_all(&mut self.state(), None, &mut told);
        self.deliver(told);
    }

    /// Begins all that may begin. Gives back `own`, if that is among it.
    fn begin_all(self: &Arc<Self>, state: &mut State, own: Option<WaitingId>, told: &mut Told) -> Option<Begun> {
        let now = self.now();
        let mut begun_itself = None;
        while let Some(begun) = state.scheduler.next(now) {
            let class = begun.request.class;
            told.observed.push(Observed::Began(class, begun.waited));
            if Some(begun.id) == own {
                begun_itself = Some(begun);
            } else if let Some(Waiter { shape, deadline, tell }) = state.waiting.remove(&begun.id) {
                let held = Some(Held { begun, shape, since: Instant::now() });
                told.permits.push((tell, Permit { inner: Arc::clone(self), held, deadline }));
            } else {
                // Cannot be: whatever waits in the scheduler waits here.
                state.scheduler.end(now, &begun, 0.0);
            }
            told.counts(state, class);
        }
        begun_itself
    }

    /// Tells everybody whose turn has come, and the host's metrics. Not under the lock: a permit that nobody receives takes it, and so may a host.
    fn deliver(self: &Arc<Self>, mut told: Told) {
        while let Some((tell, permit)) = told.permits.pop() {
            if let Err(mut unwanted) = tell.send(permit)
                && let Some(held) = unwanted.held.take()
            {
                // Not by dropping it, which would come back here, once for each that has gone.
                self.end(held, None, &mut told);
            }
        }
        for observed in told.observed {
            match observed {
                Observed::Began(class, waited) => self.instruments.of(class.0).map(|instruments| instruments.began(waited)),
                Observed::Served(class, took) => self.instruments.of(class.0).map(|instruments| instruments.served(took)),
                Observed::Counts(class, number, counts) => {
                    self.instruments.of(class.0).map(|instruments| instruments.counts(number, counts))
                }
            };
        }
    }

    /// Gives a slot back, and to the next.
    fn release(self: &Arc<Self>, held: Held, took: Option<Duration>) {
        let mut told = Told::default();
        self.end(held, took, &mut told);
        self.deliver(told);
    }

    fn end(self: &Arc<Self>, held: Held, took: Option<Duration>, told: &mut Told) {
        let class = held.begun.request.class;
        let mut state = self.state();
        if let Some(took) = took {
            state.costs.learn(held.shape, took);
            told.observed.push(Observed::Served(class, took));
        }
        state.scheduler.end(self.now(), &held.begun, took.map_or(0.0, micros));
        self.begin_all(&mut state, None, told);
        told.counts(&mut state, class);
    }
}

/// Whom to tell what, once the lock is free.
#[derive(Default)]
struct Told {
    permits: Vec<(oneshot::Sender<Permit>, Permit)>,
    observed: Vec<Observed>,
}

enum Observed {
    Began(ClassIndex, Duration),
    Served(ClassIndex, Duration),
    /// The number of the count, as what is told late must not stand, and what was under way and waiting then.
    Counts(ClassIndex, u64, (u32, u32)),
}

impl Told {
    fn counts(&mut self, state: &mut State, class: ClassIndex) {
        state.counted += 1;
        self.observed.push(Observed::Counts(class, state.counted, state.scheduler.counts(class)));
    }
}
