//! What could not be read, and why.

use mongo_core::{Error, ErrorKind};

/// What a look at many things did not get. One that cannot be read, as while it is locked, must not hide the others; but each may take as long as a
/// command may take, so after some of them no more is tried.
#[derive(Debug, Default)]
pub(crate) struct Lacking {
    failures: Vec<String>,
    /// What may not be read, the first of it by name, and how much there is.
    forbidden: (Vec<String>, usize),
}

impl Lacking {
    /// Takes a failure in. What may not be read costs no time, and is no failure of the member.
    pub(crate) fn note(&mut self, name: &str, error: &Error) {
        if error.kind() == ErrorKind::Unauthorized {
            let (names, count) = &mut self.forbidden;
            *count += 1;
            if names.len() < NAMED {
                names.push(name.to_owned());
            }
        } else {
            self.failures.push(format!("{name} cannot be read: {}", error.report()));
        }
    }

    /// The same, and says whether there have been so many that no more is to be tried.
    pub(crate) fn is_enough(&mut self, name: &str, error: &Error) -> bool {
        self.note(name, error);
        self.failures.len() >= FAILURES
    }

    /// The same for a person.
    pub(crate) fn told(mut self) -> Option<String> {
        let (names, count) = self.forbidden;
        if count > 0 {
            let more = if count > names.len() { format!(" and {} more", count - names.len()) } else { String::new() };
            let told = format!("not allowed, the role clusterMonitor would be enough: {}{more}", names.join(", "));
            self.failures.push(told);
        }
        (!self.failures.is_empty()).then(|| self.failures.join("; "))
    }
}

const FAILURES: usize = 3;
const NAMED: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_not_be_read_is_named_once_and_ends_nothing() {
        let mut lacking = Lacking::default();
        let forbidden = Error::new(ErrorKind::Unauthorized, "no");
        for number in 0..10 {
            assert!(!lacking.is_enough(&format!("shop{number}"), &forbidden));
        }
        let told = lacking.told().unwrap();
        assert!(told.ends_with("shop0, shop1, shop2 and 7 more"), "{told}");
    }

    #[test]
    fn after_some_failures_no_more_is_tried() {
        let mut lacking = Lacking::default();
        let slow = Error::new(ErrorKind::Timeout, "no answer in time");
        let enough: Vec<bool> = ["a", "b", "c"].iter().map(|name| lacking.is_enough(name, &slow)).collect();
        assert_eq!(enough, [false, false, true]);
        let told = lacking.told().unwrap();
        assert!(told.starts_with("a cannot be read: ") && told.contains("; c cannot be read"), "{told}");
    }
}
