//! What it costs to take a slot and to give it back.

use std::{num::NonZeroU32, sync::Arc};

use mongo_core::{
    Error, Result,
    clock::{Clock as _, SystemClock},
};
use mongo_workload::{Manager, ManagerSettings, Submission};
use serde::Serialize;
use tokio::{sync::Semaphore, task::JoinSet};

use super::EntrySettings;
use crate::middle;

/// Taking a slot and giving it back.
#[derive(Serialize)]
pub(super) struct Entry {
    what: &'static str,
    /// So many do it at once.
    tasks: u32,
    slots: u32,
    /// Of one of them after the other, divided by their number.
    median_nanoseconds: f64,
}

impl Entry {
    pub(super) fn print(&self) {
        println!("{:24} {:>4} tasks {:>4} slots {:>10.0} ns", self.what, self.tasks, self.slots, self.median_nanoseconds);
    }
}

pub(super) async fn entries(settings: &EntrySettings) -> Result<Vec<Entry>> {
    let mut rows = Vec::new();
    // Alone, many with room for all, and twice as many as there is room for.
    for (tasks, slots) in [(1, 64), (64, 64), (64, 32)] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..settings.runs.max(1) {
            ours.push(by_the_manager(settings.operations, tasks, slots).await?);
            theirs.push(by_a_semaphore(settings.operations, tasks, slots).await?);
        }
        for (what, seconds) in [("mongo-workload", ours), ("a semaphore, no classes", theirs)] {
            let median_nanoseconds = middle(seconds.into_iter()) * 1e9 / f64::from(settings.operations);
            rows.push(Entry { what, tasks, slots, median_nanoseconds });
        }
    }
    Ok(rows)
}

async fn by_the_manager(operations: u32, tasks: u32, slots: u32) -> Result<f64> {
    let slots = NonZeroU32::new(slots).ok_or_else(|| Error::internal("no slots"))?;
    let manager = Manager::new(ManagerSettings::default().with_slots(slots));
    timed(tasks, move || {
        let manager = manager.clone();
        async move {
            let submission = Submission::read("normal").shape("find by _id");
            for _ in 0..operations / tasks {
                let slot = manager.acquire(&submission).await?;
                held(tasks).await;
                drop(slot);
            }
            Ok(())
        }
    })
    .await
}

async fn by_a_semaphore(operations: u32, tasks: u32, slots: u32) -> Result<f64> {
    let semaphore = Arc::new(Semaphore::new(slots as usize));
    timed(tasks, move || {
        let semaphore = Arc::clone(&semaphore);
        async move {
            for _ in 0..operations / tasks {
                let slot = semaphore.acquire().await.map_err(|error| Error::internal("closed").with_source(error))?;
                held(tasks).await;
                drop(slot);
            }
            Ok(())
        }
    })
    .await
}

/// Where there are many, they hold their slots at the same time.
async fn held(tasks: u32) {
    if tasks > 1 {
        tokio::task::yield_now().await;
    }
}

async fn timed<F: Future<Output = Result<()>> + Send + 'static>(tasks: u32, task: impl Fn() -> F) -> Result<f64> {
    let clock = SystemClock::new();
    let mut running = JoinSet::new();
    for _ in 0..tasks {
        running.spawn(task());
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    Ok(clock.monotonic().as_secs_f64())
}
