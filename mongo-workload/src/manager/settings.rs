//! What a manager is made with.

use std::{num::NonZeroU32, sync::Arc};

use mongo_core::RetryPolicy;

use crate::{class::Classes, limit::AdaptiveSlots, load::LoadSignal};

/// What a manager is made with.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ManagerSettings {
    /// The classes. Default: those of [`Classes::default`].
    pub classes: Classes,
    /// How many operations of each [`Access`](crate::Access) may be under way at once. Default: a number that is found out.
    pub slots: SlotPolicy,
    /// Whether slots hold nobody up: that an operation would have waited for one is counted in `mongo_workload_observed_total`. Default false. What begins is
    /// no longer of anybody's choosing then, so no number is found out.
    pub observe_slots: bool,
    /// What the server says of its load, if anybody tells. It takes slots away, of any [`SlotPolicy`]: see [`Load`](crate::Load).
    pub load: Option<Arc<dyn LoadSignal>>,
    /// How failures other than timeouts are tried again, where that is harmless. Default: not at all, as the driver has tried already.
    pub retry: RetryPolicy,
}

/// How many operations of a kind may be under way at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum SlotPolicy {
    /// As many as the server can do without that they wait for each other in it: more would take longer and do no more.
    Adaptive(AdaptiveSlots),
    /// So many.
    Fixed(NonZeroU32),
}

impl Default for ManagerSettings {
    fn default() -> Self {
        Self {
            classes: Classes::default(),
            slots: SlotPolicy::Adaptive(AdaptiveSlots::default()),
            observe_slots: false,
            load: None,
            retry: RetryPolicy::never(),
        }
    }
}

impl ManagerSettings {
    /// Sets the classes.
    #[must_use]
    pub fn with_classes(mut self, classes: Classes) -> Self {
        self.classes = classes;
        self
    }

    /// Sets how many operations of each [`Access`](crate::Access) may be under way at once.
    #[must_use]
    pub fn with_slots(mut self, slots: NonZeroU32) -> Self {
        self.slots = SlotPolicy::Fixed(slots);
        self
    }

    /// Sets within which bounds the number of slots finds itself.
    #[must_use]
    pub fn with_adaptive_slots(mut self, slots: AdaptiveSlots) -> Self {
        self.slots = SlotPolicy::Adaptive(slots);
        self
    }

    /// Sets that slots hold nobody up.
    #[must_use]
    pub fn with_observed_slots(mut self) -> Self {
        self.observe_slots = true;
        self
    }

    /// Sets who tells of the server's load.
    #[must_use]
    pub fn with_load_signal(mut self, load: Arc<dyn LoadSignal>) -> Self {
        self.load = Some(load);
        self
    }

    /// Sets how failures other than timeouts are tried again.
    #[must_use]
    pub fn with_retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }
}
