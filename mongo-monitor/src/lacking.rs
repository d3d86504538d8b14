//! What could not be read, and why.

use std::{collections::BTreeSet, time::Duration};

use mongo_core::{Error, ErrorKind, Result, mongodb};
use tokio::time::Instant;

/// What a look at many things did not get. One that cannot be read, as while it is locked, must not hide the others; but each may take as long as a
/// command may take, so after some of them no more is tried.
#[derive(Debug, Default)]
pub(crate) struct Lacking {
    failures: Vec<String>,
    forbidden: BTreeSet<String>,
    waited: Duration,
}

impl Lacking {
    /// One that knows what could not be read before for want of a privilege: where not everything is asked for each time, it is told all the same.
    pub(crate) fn knowing(forbidden: BTreeSet<String>) -> Self {
        Self { forbidden, ..Self::default() }
    }

    /// Waits for an answer, and notes it if there is none; but not of what is not there, as it was dropped meanwhile.
    pub(crate) async fn ask<T>(
        &mut self,
        name: &str,
        deadline: Duration,
        asked: impl Future<Output = mongodb::error::Result<T>>,
    ) -> Option<T> {
        let begun = Instant::now();
        match within(deadline, asked).await {
            Ok(answer) => {
                self.may_read(name);
                Some(answer)
            }
            Err(error) if error.server_code() == Some(NAMESPACE_NOT_FOUND) => None,
            Err(error) => {
                self.note(name, &error, begun.elapsed());
                None
            }
        }
    }

    /// Notes that something is no longer forbidden.
    pub(crate) fn may_read(&mut self, name: &str) {
        self.forbidden.remove(name);
    }

    /// Takes a failure in that took so long. What may not be read is no failure of the member.
    pub(crate) fn note(&mut self, name: &str, error: &Error, took: Duration) {
        if error.server_code() == Some(UNAUTHORIZED) {
            // An answer, which costs the server as much as any.
            self.forbidden.insert(name.to_owned());
        } else {
            self.waited += took;
            self.failures.push(format!("{name} cannot be read: {}", error.report()));
        }
    }

    /// Whether there have been so many failures that no more is to be tried.
    pub(crate) fn is_enough(&self) -> bool {
        self.failures.len() >= FAILURES
    }

    /// Whether the member has answered everything, if only by saying that it is not allowed.
    pub(crate) fn has_answered(&self) -> bool {
        self.failures.is_empty()
    }

    /// Forgets what is forbidden and no longer there.
    pub(crate) fn forget_but(&mut self, is_there: impl Fn(&str) -> bool) {
        self.forbidden.retain(|name| is_there(name));
    }

    /// How long answers were waited for that did not come.
    pub(crate) fn waited(&self) -> Duration {
        self.waited
    }

    /// What is known to be forbidden, to be given to [`knowing`](Self::knowing) the next time.
    pub(crate) fn forbidden(&self) -> &BTreeSet<String> {
        &self.forbidden
    }

    /// The same for a person.
    pub(crate) fn told(&self) -> Option<String> {
        let mut told = self.failures.clone();
        if !self.forbidden.is_empty() {
            let names: Vec<&str> = self.forbidden.iter().take(NAMED).map(String::as_str).collect();
            let more = self.forbidden.len() - names.len();
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            told.push(format!("not allowed, the role clusterMonitor would be enough: {}{more}", names.join(", ")));
        }
        (!told.is_empty()).then(|| told.join("; "))
    }
}

/// A command may take so long, and no longer.
pub(crate) async fn within<T>(deadline: Duration, asked: impl Future<Output = mongodb::error::Result<T>>) -> Result<T> {
    match tokio::time::timeout(deadline, asked).await {
        Ok(answer) => answer.map_err(Error::from),
        Err(_) => Err(Error::new(ErrorKind::Timeout, "no answer in time")),
    }
}

const UNAUTHORIZED: i32 = 13;
const NAMESPACE_NOT_FOUND: i32 = 26;
const FAILURES: usize = 3;
const NAMED: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn after_some_answers_that_did_not_come_no_more_is_tried_and_the_wait_is_known() {
        let mut lacking = Lacking::default();
        for name in ["a", "b", "c"] {
            assert!(!lacking.is_enough() && lacking.has_answered() == (name == "a"));
            let never = std::future::pending::<mongodb::error::Result<()>>();
            assert!(lacking.ask(name, Duration::from_secs(2), never).await.is_none());
        }
        assert!(lacking.is_enough());
        assert_eq!(lacking.waited(), Duration::from_secs(6));
        let told = lacking.told().unwrap();
        assert!(told.starts_with("a cannot be read: ") && told.contains("; c cannot be read"), "{told}");
    }

    #[tokio::test]
    async fn what_may_not_be_read_is_named_until_it_may() {
        let known = (0..5).map(|number| format!("shop{number}")).collect();
        let mut lacking = Lacking::knowing(known);
        assert!(lacking.has_answered() && !lacking.is_enough());
        let told = lacking.told().unwrap();
        assert!(told.ends_with("shop0, shop1, shop2 and 2 more"), "{told}");
        for number in 0..5 {
            let answer = async { Ok(number) };
            assert_eq!(lacking.ask(&format!("shop{number}"), Duration::from_secs(2), answer).await, Some(number));
        }
        assert_eq!(lacking.told(), None);
    }
}
