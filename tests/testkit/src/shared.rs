//! One deployment for all tests of a process.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::OnceCell;

use crate::{Result, TestDeployment};

/// A replica set of one member, for all tests of this process; the first to ask starts it.
///
/// It runs until the process ends. Each test makes its own client, as clients do not outlive the runtime of their test,
/// and works in a database of its own name. Tests that break servers, or that look at the oplog or at the whole
/// deployment, want their own.
///
/// # Errors
///
/// Those of [`Builder::start`](crate::Builder::start); the next caller tries again.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use mongo_core::mongodb::bson::doc;
///
/// let client = mongo_testkit::shared().await?.client().await?;
/// let database = client.database(&mongo_testkit::unique_name("orders"));
/// database.collection("lines").insert_one(doc! { "_id": 1 }).await?;
/// # Ok(())
/// # }
/// ```
pub async fn shared() -> Result<&'static TestDeployment> {
    static SHARED: OnceCell<TestDeployment> = OnceCell::const_new();
    SHARED.get_or_try_init(|| TestDeployment::replica_set(1).start()).await
}

/// A name that nobody else has, for a database of one test: `prefix`, the process and a number.
///
/// Characters that a database's name cannot have become `_`, and a long `prefix` is cut.
pub fn unique_name(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let prefix: String = prefix
        .chars()
        .map(|char| if char.is_ascii_alphanumeric() || char == '-' { char } else { '_' })
        .take(LONGEST_PREFIX)
        .collect();
    format!("{prefix}_{:x}_{:x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Leaves room for the rest: a database's name has at most 63 bytes.
const LONGEST_PREFIX: usize = 40;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_for_a_database() {
        let names: Vec<_> = (0..100).map(|_| unique_name("backup::it $works/\u{fc}ber")).collect();
        let distinct: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert!(names.iter().all(|name| name.starts_with("backup__it__works__ber_")), "{names:?}");
        assert!(unique_name(&"x".repeat(100)).len() <= 63);
    }
}
