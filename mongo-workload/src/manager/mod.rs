//! The manager: lets operations in, in their order, and runs them.

mod settings;
mod status;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    num::NonZeroU32,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use mongo_core::{
    CancellationToken, Error, ErrorKind, Result, RetryBudget, RetryPolicy,
    lock::lock,
    metrics::{MetricsSink, NoMetrics},
    rate::RateLimit,
    retry,
};
use tokio::time::{Instant, timeout_at};

use crate::{
    class::{Class, ClassIndex, Classes, LONGEST, RESERVED_FOR, Rule},
    cost::Costs,
    instruments::{ClassInstruments, Instruments, Outcome},
    job::Progress,
    limit::{Controller, Fared},
    load::{Load, LoadSignal},
    permit::{Entry, Permit, Waiter},
    schedule::{Access, Scheduler, Strictness, WaitingId},
    submission::Submission,
};

pub use self::{
    settings::{ManagerSettings, SlotPolicy},
    status::{ClassStatus, Limits, Slots},
};

/// Lets operations begin in the order that their classes deserve. Clones share it.
///
/// See the [crate's docs](crate) for what it promises.
///
/// ```
/// use mongo_workload::{Manager, ManagerSettings, Submission};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> mongo_core::Result<()> {
/// let manager = Manager::new(ManagerSettings::default());
/// let count = Submission::read("high").shape("count orders");
/// let found = manager.run(&count, |limits| async move {
///     // collection.count_documents(filter).max_time(limits.max_time).comment(limits.comment).await
///     Ok(limits.batch_size)
/// });
/// assert_eq!(found.await?, 500);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Manager(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    classes: Classes,
    retry: RetryPolicy,
    budget: RetryBudget,
    pub(crate) instruments: Instruments,
    started: Instant,
    pub(crate) observes_slots: bool,
    load: Option<Arc<dyn LoadSignal>>,
    /// When to ask for the load again, in microseconds.
    load_due: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) scheduler: Scheduler,
    pub(crate) rates: Vec<Option<RateLimit>>,
    pub(crate) costs: Costs,
    /// How often it was counted what runs and waits.
    pub(crate) counted: u64,
    /// Whom to tell that it may begin.
    pub(crate) waiting: HashMap<WaitingId, Waiter>,
    /// Who says how many slots there are of each kind.
    pub(crate) limits: [SlotLimit; 2],
    load: Option<Load>,
}

#[derive(Debug)]
pub(crate) enum SlotLimit {
    Adaptive(Box<Controller>),
    Fixed(u32),
}

impl State {
    /// How many slots there are of a kind. Gives the number if it is another one than before.
    pub(crate) fn adjust(&mut self, access: Access, now: Duration) -> Option<u32> {
        let (slots, floor) = match &mut self.limits[access.position()] {
            SlotLimit::Adaptive(controller) => {
                // Beside those that are kept for somebody there is always one for everybody.
                let floor = self.scheduler.reserved(access, now).saturating_add(1);
                controller.set_floor(floor);
                controller.tick(now, &mut self.costs);
                (controller.slots(), floor)
            }
            SlotLimit::Fixed(slots) => (*slots, 1),
        };
        let slots = self.load.map_or(slots, |load| load.allows(access, slots)).max(floor);
        let before = self.scheduler.limit(access);
        self.scheduler.set_limit(access, slots);
        (slots != before).then_some(slots)
    }
}

impl Manager {
    /// A manager that tells nobody of its metrics.
    pub fn new(settings: ManagerSettings) -> Self {
        Self::with_metrics(settings, &NoMetrics)
    }

    /// A manager that tells `metrics` of every class: what waits and runs (`mongo_workload_waiting`, `mongo_workload_running`), for how long
    /// (`mongo_workload_wait_seconds`, `mongo_workload_service_seconds`), how it ended (`mongo_workload_operations_total` by `outcome`) and what was not
    /// let in (`mongo_workload_refused_total` by `reason`); what rules that only observe would have done (`mongo_workload_observed_total` by `rule`); and how many slots
    /// there are (`mongo_workload_slots` by `access`).
    pub fn with_metrics(settings: ManagerSettings, metrics: &dyn MetricsSink) -> Self {
        let ManagerSettings { classes, slots, observe_slots, load, retry } = settings;
        let limits = Access::ALL.map(|access| match slots {
            SlotPolicy::Adaptive(bounds) if !observe_slots => SlotLimit::Adaptive(Box::new(Controller::new(access, bounds))),
            SlotPolicy::Adaptive(bounds) => SlotLimit::Fixed(bounds.initial.get()),
            SlotPolicy::Fixed(slots) => SlotLimit::Fixed(slots.get()),
        });
        let strictness = match slots {
            _ if observe_slots => Strictness::Observes,
            SlotPolicy::Adaptive(_) => Strictness::BarReserved,
            SlotPolicy::Fixed(_) => Strictness::Strict,
        };
        let mut state = State {
            scheduler: Scheduler::new(&classes, [1, 1], strictness),
            rates: classes.iter().map(|class| class.rate.map(RateLimit::new)).collect(),
            costs: Costs::default(),
            counted: 0,
            waiting: HashMap::new(),
            limits,
            load: None,
        };
        let instruments = Instruments::new(metrics, &classes);
        for access in Access::ALL {
            state.adjust(access, Duration::ZERO);
            instruments.slots(access, state.scheduler.limit(access));
        }
        Self(Arc::new(Inner {
            instruments,
            classes,
            retry,
            budget: RetryBudget::default(),
            started: Instant::now(),
            observes_slots: observe_slots,
            load,
            load_due: AtomicU64::new(0),
            state: Mutex::new(state),
        }))
    }

    /// Runs `work` when its turn comes, within the limits that it is given.
    ///
    /// What times out, waiting or at work, is tried again at the next lower class, three times at most; a write that has begun only if it is
    /// [idempotent](Submission::idempotent). Other failures of the work are tried again as the [settings](ManagerSettings::retry) say, under the same
    /// condition. Both are paid for from one [`RetryBudget`], so that they cannot multiply an overload. What is refused is not tried again. Between
    /// attempts nothing is held.
    ///
    /// # Errors
    /// `InvalidInput` for a class that there is not, or more memory than it may ever have; `Unavailable` at once where too much waits, comes
    /// too often, or would not be done in time; `Timeout` when the time was up; and whatever `work` returns.
    ///
    /// # Cancel safety
    /// Dropping the future gives up its place, or drops the work and gives its slot to the next.
    pub async fn run<T, F, Fut>(&self, submission: &Submission, work: F) -> Result<T>
    where
        F: Fn(Limits) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T>> + Send,
        T: Send,
    {
        self.run_with(submission, work, &Progress::default()).await
    }

    pub(crate) async fn run_with<T, F, Fut>(&self, submission: &Submission, work: F, progress: &Progress) -> Result<T>
    where
        F: Fn(Limits) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T>> + Send,
        T: Send,
    {
        let mut class = self.0.classes.find(&submission.class)?;
        let policy = if submission.is_idempotent { self.0.retry.clone() } else { RetryPolicy::never() };
        // Nobody cancels but by dropping the future.
        let cancel = CancellationToken::new();
        let mut late: Option<Error> = None;
        for lowered in 0.. {
            let limit = self.0.time_limit(class);
            let allowed = submission.within.unwrap_or(limit).min(if lowered == 0 { LONGEST } else { limit });
            let once = |_| self.attempt(submission, (class, allowed), &work, progress);
            let error = match (retry(&policy, &self.0.budget, &cancel, once).await, late) {
                (Ok(Attempt::Ended(value)), _) => return Ok(value),
                (Ok(Attempt::Late(error)), _) => error,
                (Err(error), _) if error.kind() == ErrorKind::Timeout => error,
                (Err(error), _) | (Ok(Attempt::Refused(error)), None) => return Err(error),
                // What it came to is that its time was up, perhaps after it had begun.
                (Ok(Attempt::Refused(refused)), Some(late)) => return Err(late.with_context("and then", refused)),
            };
            let error = error.with_context("attempts", progress.attempts());
            let may_be_repeated = submission.is_idempotent || !progress.has_begun();
            match self.0.classes.below(class) {
                // What everybody's timeouts would double is paid for like any other retry.
                Some(below) if lowered < LOWERED_AT_MOST && may_be_repeated && self.0.budget.withdraw() => class = below,
                _ => return Err(error),
            }
            late = Some(error);
        }
        Err(Error::internal("an operation without an end"))
    }

    /// Waits for a slot and does the work once. The error is that of the work.
    async fn attempt<T, F, Fut>(
        &self,
        submission: &Submission,
        (class, allowed): (ClassIndex, Duration),
        work: &F,
        progress: &Progress,
    ) -> Result<Attempt<T>>
    where
        F: Fn(Limits) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T>> + Send,
        T: Send,
    {
        let attempt = progress.queued();
        // Who goes away without an outcome was cancelled.
        let mut outcome = OutcomeOnDrop { instruments: self.0.instruments.of(class.0), outcome: Some(Outcome::Cancelled) };
        let mut permit = match self.0.admit(submission, class, allowed).await {
            Ok(permit) => permit,
            Err(error) if error.kind() == ErrorKind::Timeout => {
                outcome.outcome = Some(Outcome::TimedOut);
                return Ok(Attempt::Late(error));
            }
            Err(error) => {
                // Refusals are counted as that.
                outcome.outcome = None;
                return Ok(Attempt::Refused(error));
            }
        };
        progress.running();
        // Who goes away in the middle of it says nothing of how long such work takes.
        permit.fared(Fared::Unknown);
        let result = match timeout_at(permit.deadline() + GRACE, work(permit.limits_of(attempt))).await {
            Ok(result) => result,
            Err(_) => Err(self.0.too_late(class, "the operation took longer than it may")),
        };
        match &result {
            Ok(_) => permit.fared(Fared::Well),
            Err(error) => permit.failed(error),
        }
        outcome.outcome = Some(match &result {
            Ok(_) => Outcome::Completed,
            Err(error) if error.kind() == ErrorKind::Timeout => Outcome::TimedOut,
            Err(error) if error.kind() == ErrorKind::Cancelled => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        });
        drop(permit);
        result.map(Attempt::Ended)
    }

    /// Waits for a slot, for work that a host runs itself. It is held until the [`Permit`] is dropped: hold none while there is nothing to do.
    ///
    /// # Errors
    /// As [`run`](Self::run), without those of the work.
    ///
    /// # Cancel safety
    /// Dropping the future gives up its place.
    pub async fn acquire(&self, submission: &Submission) -> Result<Permit> {
        let class = self.0.classes.find(&submission.class)?;
        let allowed = submission.within.unwrap_or(self.0.time_limit(class)).min(LONGEST);
        self.0.admit(submission, class, allowed).await
    }

    /// Changes how many operations of a kind may be under way at once, to this number whatever happens. More begin at once; what is under way beyond fewer ends as it would.
    pub fn set_slots(&self, access: Access, slots: NonZeroU32) {
        self.0.set_slots(access, slots);
    }

    /// How many operations of a kind may be under way at once, and how many are.
    pub fn slots(&self, access: Access) -> Slots {
        let state = self.0.state();
        Slots { total: state.scheduler.limit(access), busy: state.scheduler.running(access) }
    }

    pub(crate) fn class_index(&self, class: &str) -> Result<ClassIndex> {
        self.0.classes.find(class)
    }

    /// Whether anything waits of a class, or of one before it.
    pub(crate) fn waits_until(&self, last: ClassIndex) -> bool {
        let state = self.0.state();
        (0..=last.0).any(|class| state.scheduler.counts(ClassIndex(class)).1 > 0)
    }

    /// What the server said of its load last, a quarter of a second ago at most.
    pub(crate) fn load_now(&self) -> Option<Load> {
        self.0.heed_load();
        self.0.state().load
    }

    /// How it stands with each class, in their order.
    pub fn status(&self) -> Vec<ClassStatus> {
        let state = self.0.state();
        let now = self.0.now();
        let of = |(position, class): (usize, &Class)| {
            let index = ClassIndex(position);
            let (running, waiting) = state.scheduler.counts(index);
            let oldest_wait = state.scheduler.oldest(index).map(|since| now.saturating_sub(since));
            ClassStatus { class: class.name.clone(), running, waiting, oldest_wait }
        };
        self.0.classes.iter().enumerate().map(of).collect()
    }
}

impl Inner {
    pub(crate) fn now(&self) -> Duration {
        self.since_start(Instant::now())
    }

    pub(crate) fn since_start(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.started)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn class(&self, index: ClassIndex) -> &Class {
        &self.classes[index]
    }

    /// How long an operation of a class may take.
    fn time_limit(&self, class: ClassIndex) -> Duration {
        let class = &self.classes[class];
        if class.enforces(Rule::TimeLimit) { class.time_limit } else { LONGEST }
    }

    /// Asks how busy the server is, if it is time to.
    pub(crate) fn heed_load(self: &Arc<Self>) {
        let Some(signal) = &self.load else { return };
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let now = micros(self.now());
        let due = self.load_due.load(Relaxed);
        let next = now.saturating_add(micros(HEED_LOAD_EVERY));
        // One of all who come by now.
        if now < due || self.load_due.compare_exchange(due, next, Relaxed, Relaxed).is_err() {
            return;
        }
        // Its panic is printed like any other; here it is that nothing is known.
        let load = catch_unwind(AssertUnwindSafe(|| signal.load())).unwrap_or(None);
        self.state().load = load;
        self.adjust_all();
    }

    fn too_late(&self, class: ClassIndex, message: &'static str) -> Error {
        Error::new(ErrorKind::Timeout, message).with_context("class", &self.class(class).name)
    }

    /// Lets an operation in when its turn comes. What is late by then is never begun.
    async fn admit(self: &Arc<Self>, submission: &Submission, class: ClassIndex, allowed: Duration) -> Result<Permit> {
        if allowed < Duration::from_millis(1) {
            return Err(self.too_late(class, "the operation's time was up before it was submitted"));
        }
        let (place, mut told) = match self.enter(submission, class, allowed)? {
            Entry::Begun(permit) => return Ok(permit),
            Entry::Waits(place, told) => (place, told),
        };
        // Age and the end of a reservation come by themselves, and nobody tells of them.
        let mut look_again = Instant::now() + self.class(class).ages_after.min(RESERVED_FOR);
        let mut permit = loop {
            match timeout_at(place.deadline.min(look_again), &mut told).await {
                Ok(Ok(permit)) => break permit,
                Ok(Err(_)) => return Err(Error::internal("a waiting operation was forgotten")),
                Err(_) if look_again < place.deadline => {
                    look_again = Instant::now() + RESERVED_FOR;
                    self.heed_load();
                    self.adjust_all();
                }
                Err(_) => return Err(self.too_late(class, "the operation's time was up before its turn came")),
            }
        };
        permit.fared(Fared::Well);
        let (is_over, is_in_time) = (Instant::now() >= permit.deadline(), permit.is_in_time());
        if is_over || !is_in_time && self.class(class).enforces(Rule::Deadline) {
            permit.give_back_unused();
            return Err(self.too_late(class, "too little of the operation's time was left when its turn came"));
        }
        if !is_in_time && let Some(instruments) = self.instruments.of(class.0) {
            instruments.would(Rule::Deadline);
        }
        Ok(permit)
    }
}

/// What came of an attempt that the work did not end with an error.
enum Attempt<T> {
    Ended(T),
    /// Its time was up before its turn came.
    Late(Error),
    /// It was not let in.
    Refused(Error),
}

/// Counts how an operation ended, also if nobody waits for its end.
struct OutcomeOnDrop<'a> {
    instruments: Option<&'a ClassInstruments>,
    outcome: Option<Outcome>,
}

impl Drop for OutcomeOnDrop<'_> {
    fn drop(&mut self) {
        if let (Some(instruments), Some(outcome)) = (self.instruments, self.outcome) {
            instruments.ended(outcome);
        }
    }
}

/// After so many timeouts, each tried again at a lower class, an operation has failed.
const LOWERED_AT_MOST: u32 = 3;
/// So long after its time the server has for telling that it has ended an operation: if that is not awaited, its connection is lost with it.
const GRACE: Duration = Duration::from_millis(500);
const HEED_LOAD_EVERY: Duration = Duration::from_millis(250);
