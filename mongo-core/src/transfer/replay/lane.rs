//! A lane: a worker that applies one batch after the other.

use std::sync::Arc;

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::{apply::Applier, batch::Batch};
use crate::error::{Error, Result};

#[derive(Debug)]
pub(super) struct Lane {
    batch: Batch,
    work: mpsc::Sender<Work>,
    worker: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
enum Work {
    Apply(Batch),
    Tell(oneshot::Sender<()>),
}

impl Lane {
    pub(super) fn open(applier: Arc<Applier>) -> Self {
        let (work, mut waiting) = mpsc::channel(WAITING);
        let worker = tokio::spawn(async move {
            while let Some(next) = waiting.recv().await {
                match next {
                    Work::Apply(batch) => applier.apply(batch).await?,
                    // Whoever asked may have gone.
                    Work::Tell(asking) => drop(asking.send(())),
                }
            }
            Ok(())
        });
        Self { batch: Batch::default(), work, worker: Some(worker) }
    }

    pub(super) fn batch(&mut self) -> &mut Batch {
        &mut self.batch
    }

    /// Sends the batch that was gathered on its way.
    pub(super) async fn send(&mut self) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.batch);
        if self.work.send(Work::Apply(batch)).await.is_ok() { Ok(()) } else { self.failed().await }
    }

    /// Waits until all that was sent is applied.
    pub(super) async fn empty(&mut self) -> Result<()> {
        let (tell, told) = oneshot::channel();
        if self.work.send(Work::Tell(tell)).await.is_err() || told.await.is_err() {
            return self.failed().await;
        }
        Ok(())
    }

    /// The worker has ended: why?
    async fn failed(&mut self) -> Result<()> {
        let ended = || Error::internal("a lane of the replay has ended before its work was done");
        match self.worker.take() {
            Some(worker) => worker.await?.and_then(|()| Err(ended())),
            None => Err(ended()),
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if let Some(worker) = &self.worker {
            worker.abort();
        }
    }
}

/// Batches that wait in a lane: one is enough to keep the worker busy.
const WAITING: usize = 1;
