//! Slots: given, waited for, and given back whatever happens.

use std::{num::NonZeroU32, sync::Arc, time::Duration};

use mongo_core::{Error, ErrorKind, Result};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    class::{Class, ClassIndex, Rule},
    cost::{ShapeKey, micros},
    instruments::{ClassInstruments, RefusedFor},
    limit::{Ended, Fared},
    manager::{Inner, Limits, SlotLimit, State},
    schedule::{Access, Begun, Refusal, Request, Strictness, WaitingId},
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
    fared: Fared,
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

    /// Says that its work has failed, and how: timeouts and overload lower [adaptive slots](crate::AdaptiveSlots), and how long other failures took is not taken for how long such
    /// work takes. Without this it has gone well.
    pub fn failed(&mut self, error: &Error) {
        self.fared(match error.kind() {
            _ if error.is_overload() => Fared::Overload,
            ErrorKind::Timeout => Fared::Late,
            _ => Fared::Unknown,
        });
    }

    pub(crate) fn fared(&mut self, fared: Fared) {
        if let Some(held) = &mut self.held {
            held.fared = fared;
        }
    }

    /// Whether what is left of its time is enough, by experience.
    pub(crate) fn is_in_time(&self) -> bool {
        let Some(held) = &self.held else { return true };
        let left = self.deadline.saturating_duration_since(Instant::now());
        micros(left) >= believable(held.begun.request.cost, held.begun.waited + left)
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// As dropping it, but nothing is to be learned from how long it was held.
    pub(crate) fn give_back_unused(mut self) {
        if let Some(held) = self.held.take() {
            self.inner.release(Instant::now(), held, None);
        }
    }

    fn class(&self) -> &Class {
        self.inner.class(self.held.as_ref().map_or(ClassIndex(0), |held| held.begun.request.class))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            let now = Instant::now();
            let took = now.saturating_duration_since(held.since);
            self.inner.release(now, held, Some(took));
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
            self.inner.begin_all(&mut state, Instant::now(), None, &mut told);
            told.counts(&mut state, self.class);
        }
        self.inner.deliver(told);
    }
}

impl Inner {
    /// Begins an operation or lets it wait.
    pub(crate) fn enter(self: &Arc<Self>, submission: &Submission, class: ClassIndex, allowed: Duration) -> Result<Entry> {
        self.heed_load();
        // The clock is read once for everything: it is a good part of what this costs.
        let now = Instant::now();
        let deadline = now + allowed;
        let mut told = Told::default();
        let entry = {
            let mut state = self.state();
            let entry = match self.arrive(&mut state, submission, (class, allowed), now, &mut told) {
                Ok((id, shape)) => match self.begin_all(&mut state, now, Some(id), &mut told) {
                    Some(begun) => {
                        let held = Some(Held { begun, shape, since: now, fared: Fared::Well });
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
        (class, allowed): (ClassIndex, Duration),
        now: Instant,
        told: &mut Told,
    ) -> Result<(WaitingId, ShapeKey), (RefusedFor, Error)> {
        let now = self.since_start(now);
        let Submission { access, memory_bytes, .. } = *submission;
        let mut refuse = |rule: Rule, reason: RefusedFor, error: Error| {
            if self.class(class).enforces(rule) {
                return Err((reason, error));
            }
            told.observed.push(Observed::Would(class, rule));
            Ok(())
        };
        state.scheduler.look_at(class, now);
        let shape = state.costs.key(class, access, &submission.shape);
        let request = Request { class, access, cost: state.costs.expected(shape), memory_bytes };
        let wait = state.scheduler.expected_wait(class, access);
        if wait > 0.0 && wait + believable(request.cost, allowed) > micros(allowed) {
            let message = "so much of its class waits that it would not be done in time: submit less, or allow more time";
            refuse(Rule::Deadline, RefusedFor::Deadline, Error::new(ErrorKind::Unavailable, message))?;
        }
        match state.scheduler.refusal(&request) {
            Some(Refusal::QueueFull) => {
                let message = "too much of its class waits already: submit less, or raise max_queued";
                refuse(Rule::Queue, RefusedFor::Queue, Error::new(ErrorKind::Unavailable, message))?;
            }
            Some(Refusal::TooLarge) => {
                let message = "the operation needs more memory than its class may ever have: raise max_memory_bytes";
                refuse(Rule::Memory, RefusedFor::Memory, Error::new(ErrorKind::InvalidInput, message))?;
            }
            None => {}
        }
        // Last, as it is counted.
        if let Some(Some(rate)) = state.rates.get_mut(class.0)
            && let Err(wait) = rate.admit(now)
        {
            let error = Error::new(ErrorKind::Unavailable, "work of this class comes more often than its rate allows");
            refuse(Rule::Rate, RefusedFor::Rate, error.with_context("welcome again in ms", wait.as_millis() + 1))?;
        }
        let id = state.scheduler.arrive(now, request);
        let is_trying = matches!(&state.limits[access.position()], SlotLimit::Adaptive(controller) if controller.is_trying());
        if is_trying || self.class(class).reserved > 0 {
            // It has a claim again, or a trial may be over though nothing ends.
            told.adjust(state, access, now);
        }
        Ok((id, shape))
    }

    pub(crate) fn set_slots(self: &Arc<Self>, access: Access, slots: NonZeroU32) {
        {
            let mut state = self.state();
            state.limits[access.position()] = SlotLimit::Fixed(slots.get());
            if !self.observes_slots {
                state.scheduler.set_strictness(access, Strictness::Strict);
            }
        }
        self.adjust_all();
    }

    /// Sees to it that there are as many slots as there ought to be, and begins what may begin by that.
    pub(crate) fn adjust_all(self: &Arc<Self>) {
        let mut told = Told::default();
        {
            let mut state = self.state();
            let now = self.now();
            Access::ALL.into_iter().for_each(|access| told.adjust(&mut state, access, now));
            self.begin_all(&mut state, Instant::now(), None, &mut told);
        }
        self.deliver(told);
    }

    /// Begins all that may begin. Gives back `own`, if that is among it.
    fn begin_all(
        self: &Arc<Self>,
        state: &mut State,
        instant: Instant,
        own: Option<WaitingId>,
        told: &mut Told,
    ) -> Option<Begun> {
        let now = self.since_start(instant);
        let mut begun_itself = None;
        while let Some(begun) = state.scheduler.next(now) {
            let class = begun.request.class;
            told.observed.push(Observed::Began(class, begun.waited));
            told.observed.extend(begun.beyond.map(|rule| Observed::Would(class, rule)));
            told.observed.extend(begun.beyond_slots.then_some(Observed::WouldWait(class)));
            if Some(begun.id) == own {
                begun_itself = Some(begun);
            } else if let Some(Waiter { shape, deadline, tell }) = state.waiting.remove(&begun.id) {
                // Until who waits has it: one that has gone away says nothing of how long such work takes.
                let held = Some(Held { begun, shape, since: instant, fared: Fared::Unknown });
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
                self.end(Instant::now(), held, None, &mut told);
            }
        }
        let of_class = |class: ClassIndex, tell: &dyn Fn(&ClassInstruments)| {
            if let Some(instruments) = self.instruments.of(class.0) {
                tell(instruments);
            }
        };
        for observed in told.observed {
            match observed {
                Observed::Began(class, waited) => of_class(class, &|instruments| instruments.began(waited)),
                Observed::Served(class, took) => of_class(class, &|instruments| instruments.served(took)),
                Observed::Counts(class, number, counts) => of_class(class, &|instruments| instruments.counts(number, counts)),
                Observed::Would(class, rule) => of_class(class, &|instruments| instruments.would(rule)),
                Observed::WouldWait(class) => of_class(class, &ClassInstruments::would_wait),
                Observed::Slots(access, slots) => self.instruments.slots(access, slots),
            }
        }
    }

    /// Gives a slot back, and to the next.
    fn release(self: &Arc<Self>, now: Instant, held: Held, took: Option<Duration>) {
        let mut told = Told::default();
        self.end(now, held, took, &mut told);
        self.deliver(told);
        // Last: it is a host's code.
        self.heed_load();
    }

    fn end(self: &Arc<Self>, instant: Instant, held: Held, took: Option<Duration>, told: &mut Told) {
        let Request { class, access, .. } = held.begun.request;
        let now = self.since_start(instant);
        let mut guard = self.state();
        let state = &mut *guard;
        if let Some(took) = took {
            // How long it takes to fail says nothing of how long it takes; that it took at least so long does.
            if held.fared == Fared::Well || held.fared == Fared::Late && micros(took) > state.costs.expected(held.shape) {
                state.costs.learn(held.shape, took);
            }
            told.observed.push(Observed::Served(class, took));
            if held.begun.waited + took > self.class(class).time_limit && !self.class(class).enforces(Rule::TimeLimit) {
                told.observed.push(Observed::Would(class, Rule::TimeLimit));
            }
            if let SlotLimit::Adaptive(controller) = &mut state.limits[access.position()] {
                let ended = Ended {
                    shape: held.shape,
                    began: now.saturating_sub(took),
                    took,
                    fared: held.fared,
                    running: state.scheduler.running(access),
                    others_wait: state.scheduler.anything_waits(access),
                };
                controller.ended(now, ended, &mut state.costs);
                told.adjust(state, access, now);
            }
        }
        state.scheduler.end(now, &held.begun, took.map_or(0.0, micros));
        self.begin_all(state, instant, None, told);
        told.counts(state, class);
    }
}

/// What an operation is believed to cost when it is asked whether it will be done in time: half of what it is allowed at most. Who was taken for too dear once would never be let in again
/// to show that it is not.
fn believable(cost: f64, allowed: Duration) -> f64 {
    cost.min(micros(allowed) / 2.0)
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
    /// A rule that only observes would have refused it, held it up or ended it.
    Would(ClassIndex, Rule),
    /// It would have waited for a slot, had slots not only observed.
    WouldWait(ClassIndex),
    Slots(Access, u32),
}

impl Told {
    fn adjust(&mut self, state: &mut State, access: Access, now: Duration) {
        self.observed.extend(state.adjust(access, now).map(|slots| Observed::Slots(access, slots)));
    }

    fn counts(&mut self, state: &mut State, class: ClassIndex) {
        state.counted += 1;
        self.observed.push(Observed::Counts(class, state.counted, state.scheduler.counts(class)));
    }
}
