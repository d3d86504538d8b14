//! Operations that are submitted and looked after by a handle.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering::Relaxed},
};

use mongo_core::{CancellationToken, Error, ErrorKind, Result};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    manager::{Limits, Manager},
    submission::Submission,
};

/// An operation that was [submitted](Manager::submit). Dropping it cancels the operation.
#[derive(Debug)]
#[must_use]
pub struct Job<T> {
    progress: Arc<Progress>,
    cancel: CancellationToken,
    task: AbortOnDropHandle<Result<T>>,
}

/// How it stands with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum JobStatus {
    /// It was given up.
    Cancelled,
    /// It has ended well.
    Completed,
    /// It was refused, or has ended with an error.
    Failed,
    /// It waits for its turn, for the first time or once more.
    Queued,
    /// It is under way.
    Running,
    /// Its time was up, at the last attempt too.
    TimedOut,
}

impl<T> Job<T> {
    /// How it stands.
    pub fn status(&self) -> JobStatus {
        self.progress.status()
    }

    /// Attempts so far, the one under way included.
    pub fn attempts(&self) -> u32 {
        self.progress.attempts()
    }

    /// Gives it up: its place if it waits, its work by dropping that. [`outcome`](Self::outcome) is [`ErrorKind::Cancelled`] then, unless it has ended before.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Those of [`Manager::run`]; `Cancelled` if it was; `Internal` if the work panicked.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the operation.
    pub async fn outcome(self) -> Result<T> {
        self.task.await?
    }
}

impl Manager {
    /// Runs `work` as [`run`](Self::run) does, in a task of its own, and gives a handle to it. To be called within a tokio runtime.
    ///
    /// ```
    /// use mongo_workload::{JobStatus, Manager, ManagerSettings, Submission};
    ///
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> mongo_core::Result<()> {
    /// let manager = Manager::new(ManagerSettings::default());
    /// let job = manager.submit(Submission::read("low"), |limits| async move { Ok(limits.attempt) });
    /// assert_eq!(job.status(), JobStatus::Queued);
    /// assert_eq!(job.outcome().await?, 1);
    /// # Ok(()) }
    /// ```
    pub fn submit<T, F, Fut>(&self, submission: Submission, work: F) -> Job<T>
    where
        F: Fn(Limits) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let (progress, cancel) = (Arc::<Progress>::default(), CancellationToken::new());
        let (manager, of_task, cancelled) = (self.clone(), EndOnDrop(Arc::clone(&progress)), cancel.clone());
        let task = tokio::spawn(async move {
            let result = tokio::select! {
                biased;
                () = cancelled.cancelled() => Err(Error::cancelled()),
                result = manager.run_with(&submission, work, &of_task.0) => result,
            };
            of_task.0.end(&result);
            result
        });
        Job { progress, cancel, task: AbortOnDropHandle::new(task) }
    }
}

/// What is known of an operation while it is looked after.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// One of the constants below.
    phase: AtomicU8,
    attempts: AtomicU32,
    /// Whether the work was ever begun.
    has_begun: AtomicBool,
}

impl Progress {
    /// A new attempt waits; gives its number, from 1.
    pub(crate) fn queued(&self) -> u32 {
        self.phase.store(QUEUED, Relaxed);
        self.attempts.fetch_add(1, Relaxed) + 1
    }

    pub(crate) fn running(&self) {
        self.has_begun.store(true, Relaxed);
        self.phase.store(RUNNING, Relaxed);
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.has_begun.load(Relaxed)
    }

    pub(crate) fn attempts(&self) -> u32 {
        self.attempts.load(Relaxed)
    }

    fn end<T>(&self, result: &Result<T>) {
        let phase = match result.as_ref().map_err(Error::kind) {
            Ok(_) => COMPLETED,
            Err(ErrorKind::Cancelled) => CANCELLED,
            Err(ErrorKind::Timeout) => TIMED_OUT,
            Err(_) => FAILED,
        };
        self.phase.store(phase, Relaxed);
    }

    fn status(&self) -> JobStatus {
        match self.phase.load(Relaxed) {
            QUEUED => JobStatus::Queued,
            RUNNING => JobStatus::Running,
            COMPLETED => JobStatus::Completed,
            TIMED_OUT => JobStatus::TimedOut,
            CANCELLED => JobStatus::Cancelled,
            _ => JobStatus::Failed,
        }
    }
}

/// What goes away without an end has failed if it panics, and was cancelled otherwise.
struct EndOnDrop(Arc<Progress>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        if matches!(self.0.phase.load(Relaxed), QUEUED | RUNNING) {
            self.0.phase.store(if std::thread::panicking() { FAILED } else { CANCELLED }, Relaxed);
        }
    }
}

const QUEUED: u8 = 0;
const RUNNING: u8 = 1;
const COMPLETED: u8 = 2;
const TIMED_OUT: u8 = 3;
const CANCELLED: u8 = 4;
const FAILED: u8 = 5;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{sync::Notify, time::sleep};

    use super::*;
    use crate::ManagerSettings;

    fn manager() -> Manager {
        Manager::new(ManagerSettings::default().with_slots(std::num::NonZeroU32::MIN))
    }

    async fn settled() {
        // With time paused, everything that can go on does so before this ends.
        sleep(Duration::from_millis(1)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_tells_how_it_stands_from_its_place_to_its_end() {
        let (manager, go) = (manager(), Arc::new(Notify::new()));
        let holder = manager.acquire(&Submission::read("low")).await.unwrap();
        let signal = Arc::clone(&go);
        let job = manager.submit(Submission::read("high"), move |_| {
            let signal = Arc::clone(&signal);
            async move {
                signal.notified().await;
                Ok(7)
            }
        });
        settled().await;
        assert_eq!((job.status(), job.attempts()), (JobStatus::Queued, 1));
        drop(holder);
        settled().await;
        assert_eq!(job.status(), JobStatus::Running);
        go.notify_one();
        settled().await;
        assert_eq!(job.status(), JobStatus::Completed);
        assert_eq!(job.outcome().await.unwrap(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_can_be_given_up_while_it_waits_and_while_it_works() {
        let manager = manager();
        let work = |_| async {
            sleep(Duration::from_secs(20)).await;
            Ok(())
        };
        let (works, waits) = (manager.submit(Submission::read("high"), work), manager.submit(Submission::read("high"), work));
        settled().await;
        assert_eq!((works.status(), waits.status()), (JobStatus::Running, JobStatus::Queued));
        waits.cancel();
        settled().await;
        assert_eq!(waits.status(), JobStatus::Cancelled);
        works.cancel();
        assert_eq!(works.outcome().await.unwrap_err().kind(), ErrorKind::Cancelled);
        // Both have left their slot and their place.
        drop(manager.submit(Submission::read("high"), work));
        settled().await;
        assert!(manager.status().iter().all(|class| (class.running, class.waiting) == (0, 0)));
    }

    #[tokio::test(start_paused = true)]
    async fn timeouts_failures_and_panics_are_told_apart() {
        let manager = manager();
        let slow = manager.submit(Submission::read("critical"), |_| async {
            sleep(Duration::from_secs(1000)).await;
            Ok(())
        });
        // Each attempt is awaited half a second longer than it has.
        sleep(Duration::from_secs(60 + 30 + 15 + 5 + 4)).await;
        assert_eq!((slow.status(), slow.attempts()), (JobStatus::TimedOut, 4));
        let wrong = manager.submit(Submission::read("low"), |_| async { Err::<(), _>(Error::invalid("wrong")) });
        settled().await;
        assert_eq!(wrong.status(), JobStatus::Failed);
        let panics = manager.submit(Submission::read("low"), |_| async { panic!("on purpose") as Result<()> });
        settled().await;
        assert_eq!(panics.status(), JobStatus::Failed);
        assert_eq!(panics.outcome().await.unwrap_err().kind(), ErrorKind::Internal);
    }
}
