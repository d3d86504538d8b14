//! How often a capture stores, and the builder that collects it.

use std::{sync::Arc, time::Duration};

use mongo_core::{
    CancellationToken, Deployment, Error, Result,
    progress::{NoProgress, ProgressSink},
};
use serde::{Deserialize, Serialize};

use super::Capture;
use crate::{repository::Repository, setters::conduct_setters};

/// How a capture works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct CaptureSettings {
    /// How long what was read may wait before it is stored: what a disaster that takes the deployment away takes with it. Default 10 s.
    pub every: Duration,
    /// How many bytes may wait before they are stored. Default 16 MiB, at most 32 MiB; they are in memory.
    pub slice_bytes: usize,
    /// How often the deployment is asked for more. Default 500 ms.
    pub poll: Duration,
}

impl Default for CaptureSettings {
    fn default() -> Self {
        Self { every: Duration::from_secs(10), slice_bytes: 16 << 20, poll: Duration::from_millis(500) }
    }
}

/// Prepares a [`Capture`].
#[derive(Debug)]
#[must_use]
pub struct CaptureBuilder {
    deployment: Deployment,
    repository: Repository,
    settings: CaptureSettings,
    progress: Arc<dyn ProgressSink>,
    cancel: CancellationToken,
}

impl CaptureBuilder {
    pub(super) fn new(deployment: Deployment, repository: Repository) -> Self {
        Self {
            deployment,
            repository,
            settings: CaptureSettings::default(),
            progress: Arc::new(NoProgress),
            cancel: CancellationToken::new(),
        }
    }

    /// Replaces all settings.
    pub fn settings(mut self, settings: CaptureSettings) -> Self {
        self.settings = settings;
        self
    }

    /// Stores what was read at least so often.
    pub fn every(mut self, every: Duration) -> Self {
        self.settings.every = every;
        self
    }

    conduct_setters!("Ends when `token` is cancelled, after what has come until then was stored.");

    /// Checks the settings.
    ///
    /// # Errors
    /// `InvalidInput` for slices of no bytes or of more than 32 MiB, or for asking all the time.
    pub fn build(self) -> Result<Capture> {
        if !(1..=32 << 20).contains(&self.settings.slice_bytes) {
            return Err(Error::invalid("a slice has from one byte to 32 MiB"));
        }
        if self.settings.poll < Duration::from_millis(10) {
            return Err(Error::invalid("the deployment may be asked a hundred times a second at most"));
        }
        Ok(Capture {
            deployment: self.deployment,
            repository: self.repository,
            settings: self.settings,
            progress: self.progress,
            cancel: self.cancel,
        })
    }
}
