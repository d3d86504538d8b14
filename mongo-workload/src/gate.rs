//! The gate at which background work asks a manager.

use std::time::Duration;

use mongo_core::gate::{Gate, Verdict};

use crate::{class::ClassIndex, load::Load, manager::Manager, schedule::Access};

/// Lets backups, restores and migrations go on while a [`Manager`] has room for them.
///
/// They are held while an operation of a class waits, down to the one that is named, or while the server says that it is [loaded](Load): somebody waits for a ticket, more than
/// 15 percent of the cache are dirty, a secondary lags more than ten seconds. A batch is held for [ten seconds](mongo_core::gate::LONGEST_HOLD) at most, so that the work goes on
/// in the end.
///
/// ```
/// use std::sync::Arc;
/// use mongo_core::gate::{Gate, Verdict};
/// use mongo_workload::{Manager, ManagerSettings};
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> mongo_core::Result<()> {
/// let manager = Manager::new(ManagerSettings::default());
/// // Yields to everything but what is in "low".
/// let gate = Arc::new(manager.gate("normal")?);
/// // Backup::builder(&deployment, &repository).gate(gate.clone())
/// assert_eq!(gate.check("backup"), Verdict::Proceed);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct ManagerGate {
    manager: Manager,
    /// The last class, in their order, that background work yields to.
    yields_to: ClassIndex,
}

impl Manager {
    /// A gate for background work that yields to this class and all before it.
    ///
    /// # Errors
    /// `InvalidInput` for a class that there is not.
    pub fn gate(&self, class: &str) -> mongo_core::Result<ManagerGate> {
        Ok(ManagerGate { yields_to: self.class_index(class)?, manager: self.clone() })
    }
}

impl Gate for ManagerGate {
    fn check(&self, _: &str) -> Verdict {
        if self.manager.waits_until(self.yields_to) || self.manager.load_now().is_some_and(|load| is_loaded(&load)) {
            Verdict::Hold(LOOK_AGAIN)
        } else {
            Verdict::Proceed
        }
    }
}

/// Whether a server has too much to do for work that can wait.
fn is_loaded(load: &Load) -> bool {
    const SLOTS: u32 = 1000;
    let waits = load.read_tickets.waiting > 0 || load.write_tickets.waiting > 0;
    waits || Access::ALL.into_iter().any(|access| load.allows(access, SLOTS) < SLOTS)
}

const LOOK_AGAIN: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use std::{
        num::NonZeroU32,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::Relaxed},
        },
    };

    use super::*;
    use crate::{load::Tickets, manager::ManagerSettings, submission::Submission};

    #[tokio::test(start_paused = true)]
    async fn background_work_yields_to_what_waits_and_to_nothing_else() {
        let manager = Manager::new(ManagerSettings::default().with_slots(NonZeroU32::MIN));
        let gate = manager.gate("normal").unwrap();
        assert!(manager.gate("urgent").is_err());
        let holder = manager.acquire(&Submission::read("critical")).await.unwrap();
        assert_eq!(gate.check("backup"), Verdict::Proceed, "nobody waits");
        let low = manager.submit(Submission::read("low"), |_| async { Ok(()) });
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(gate.check("backup"), Verdict::Proceed, "what waits can wait as well");
        let normal = manager.submit(Submission::read("normal"), |_| async { Ok(()) });
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(gate.check("backup"), Verdict::Hold(LOOK_AGAIN));
        drop(holder);
        normal.outcome().await.unwrap();
        low.outcome().await.unwrap();
        assert_eq!(gate.check("backup"), Verdict::Proceed);
    }

    #[tokio::test(start_paused = true)]
    async fn background_work_yields_to_a_loaded_server_also_when_nothing_is_submitted() {
        let is_busy = Arc::new(AtomicBool::new(true));
        let told = Arc::clone(&is_busy);
        let signal = move || {
            let mut load = Load::default();
            if told.load(Relaxed) {
                load.write_tickets = Tickets::new(128, 3);
            }
            Some(load)
        };
        let manager = Manager::new(ManagerSettings::default().with_load_signal(Arc::new(signal)));
        let gate = manager.gate("low").unwrap();
        assert_eq!(gate.check("backup"), Verdict::Hold(LOOK_AGAIN));
        is_busy.store(false, Relaxed);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(gate.check("backup"), Verdict::Proceed);
    }
}
