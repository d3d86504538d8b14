//! Setters that the builders of several operations share.

/// `progress` and `cancellation`, for fields `progress` and `cancel`.
macro_rules! conduct_setters {
    ($cancelled:literal) => {
        /// Tells `sink` how it goes.
        pub fn progress(mut self, sink: std::sync::Arc<dyn mongo_core::progress::ProgressSink>) -> Self {
            self.progress = sink;
            self
        }

        #[doc = $cancelled]
        pub fn cancellation(mut self, token: mongo_core::CancellationToken) -> Self {
            self.cancel = token;
            self
        }
    };
}

/// `gate`, for a field `background`.
macro_rules! gate_setter {
    ($work:literal) => {
        #[doc = concat!("Asks `gate` before each batch, under the name \"", $work, "\", so that it yields to what cannot wait. A batch is held for")]
        /// [`LONGEST_HOLD`](mongo_core::gate::LONGEST_HOLD) at most. Default: it asks nobody.
        pub fn gate(mut self, gate: std::sync::Arc<dyn mongo_core::gate::Gate>) -> Self {
            self.background = mongo_core::gate::Background::new(gate, $work);
            self
        }
    };
}

/// `namespaces` and `exclude`, for a field `selection` that keeps the first error.
macro_rules! pattern_setters {
    () => {
        /// Takes the namespaces that match `pattern`, as `shop.*`; may be called several times.
        pub fn namespaces(mut self, pattern: &str) -> Self {
            self.selection = self.selection.and_then(|selection| selection.including(pattern));
            self
        }

        /// Leaves out the namespaces that match `pattern`.
        pub fn exclude(mut self, pattern: &str) -> Self {
            self.selection = self.selection.and_then(|selection| selection.excluding(pattern));
            self
        }
    };
}

pub(crate) use {conduct_setters, gate_setter, pattern_setters};
