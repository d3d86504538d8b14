//! Slots: given, waited for, and given back whatever happens.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use mongo_core::{ErrorKind, Result};
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
        let mut state = self.inner.state();
        // If its turn has come in the meantime, the permit that nobody receives gives the slot back.
        if state.scheduler.withdraw(self.id, self.class, self.access) {
            state.waiting.remove(&self.id);
            self.inner.tell_counts(&state, self.class);
        }
    }
}

impl Inner {
    /// Begins an operation or lets it wait.
    pub(crate) fn enter(self: &Arc<Self>, submission: &Submission, class: ClassIndex, allowed: Duration) -> Result<Entry> {
        let now = self.now();
        let deadline = Instant::now() + allowed;
        let mut told = Told::default();
        let entry = {
            let mut state = self.state();
            let (shape, request) = self.check(&mut state, submission, class, allowed, now)?;
            let id = state.scheduler.arrive(now, request).map_err(|refusal| match refusal {
                Refusal::QueueFull => {
                    let message = "too much of its class waits already: submit less, or raise max_queued";
                    self.refuse(class, RefusedFor::Queue, ErrorKind::Unavailable, message)
                }
                Refusal::TooLarge => {
                    let message = "the operation needs more memory than its class may ever have: raise max_memory_bytes";
                    self.refuse(class, RefusedFor::Memory, ErrorKind::InvalidInput, message)
                }
            })?;
            let begun = self.begin_all(&mut state, now, Some(id), &mut told);
            let entry = match begun {
                Some(begun) => Entry::Begun(Permit {
                    inner: Arc::clone(self),
                    held: Some(Held { begun, shape, since: Instant::now() }),
                    deadline,
                }),
                None => {
                    let (tell, receiver) = oneshot::channel();
                    state.waiting.insert(id, Waiter { shape, deadline, tell });
                    let inner = Arc::clone(self);
                    Entry::Waits(Place { inner, id, class, access: submission.access, deadline }, receiver)
                }
            };
            self.tell_counts(&state, class);
            entry
        };
        self.deliver(told);
        Ok(entry)
    }

    /// Refuses what comes too often, or would not be done in time.
    fn check(
        &self,
        state: &mut State,
        submission: &Submission,
        class: ClassIndex,
        allowed: Duration,
        now: Duration,
    ) -> Result<(ShapeKey, Request)> {
        if let Some(Some(rate)) = state.rates.get_mut(class.0)
            && let Err(wait) = rate.admit(now)
        {
            let message = "work of this class comes more often than its rate allows";
            let refused = self.refuse(class, RefusedFor::Rate, ErrorKind::Unavailable, message);
            return Err(refused.with_context("welcome again in ms", wait.as_millis() + 1));
        }
        let Submission { access, memory_bytes, .. } = *submission;
        let shape = state.costs.key(class, access, &submission.shape);
        let cost = state.costs.expected(shape);
        let wait = state.scheduler.expected_wait(class, access);
        // Who need not wait is let in however dear it is believed to be: else nobody would ever learn that it is not.
        if wait > 0.0 && wait + cost > micros(allowed) {
            let message = "so much of its class waits that it would not be done in time: submit less, or allow more time";
            return Err(self.refuse(class, RefusedFor::Deadline, ErrorKind::Unavailable, message));
        }
        Ok((shape, Request { class, access, cost, memory_bytes }))
    }

    pub(crate) fn set_slots(self: &Arc<Self>, access: Access, slots: NonZeroU32) {
        let mut told = Told::default();
        {
            let mut state = self.state();
            state.scheduler.set_limit(access, slots.get());
            let now = self.now();
            let _ = self.begin_all(&mut state, now, None, &mut told);
        }
        self.deliver(told);
    }

    /// Begins all that may begin. Gives back `own`, if that is among it.
    fn begin_all(self: &Arc<Self>, state: &mut State, now: Duration, own: Option<WaitingId>, told: &mut Told) -> Option<Begun> {
        let mut begun_itself = None;
        while let Some(begun) = state.scheduler.next(now) {
            if let Some(instruments) = self.instruments.of(begun.request.class.0) {
                instruments.began(begun.waited);
            }
            self.tell_counts(state, begun.request.class);
            if Some(begun.id) == own {
                begun_itself = Some(begun);
                continue;
            }
            match state.waiting.remove(&begun.id) {
                Some(Waiter { shape, deadline, tell }) => {
                    let held = Some(Held { begun, shape, since: Instant::now() });
                    told.0.push((tell, Permit { inner: Arc::clone(self), held, deadline }));
                }
                // Cannot be: whatever waits in the scheduler waits here.
                None => state.scheduler.end(now, &begun, 0.0),
            }
        }
        begun_itself
    }

    /// Tells everybody whose turn has come. Not under the lock: a permit that nobody receives takes it.
    fn deliver(self: &Arc<Self>, mut told: Told) {
        while let Some((tell, permit)) = told.0.pop() {
            if let Err(mut unwanted) = tell.send(permit)
                && let Some(held) = unwanted.held.take()
            {
                // Not by dropping it, which would come back here, once for each that has gone.
                self.end(held, None, &mut told);
            }
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
        let now = self.now();
        if let Some(took) = took {
            state.costs.learn(held.shape, took);
            if let Some(instruments) = self.instruments.of(class.0) {
                instruments.served(took);
            }
        }
        state.scheduler.end(now, &held.begun, took.map_or(0.0, micros));
        let _ = self.begin_all(&mut state, now, None, told);
        self.tell_counts(&state, class);
    }

    fn tell_counts(&self, state: &State, class: ClassIndex) {
        if let Some(instruments) = self.instruments.of(class.0) {
            instruments.counts(state.scheduler.counts(class));
        }
    }
}

/// Whom to tell, once the lock is free.
#[derive(Default)]
struct Told(Vec<(oneshot::Sender<Permit>, Permit)>);
