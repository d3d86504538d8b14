//! Patterns over names.

use std::fmt;

/// A pattern over a whole text: `*` stands for any run of characters, `\*` for a star, `\\` for a backslash. A backslash before anything else
/// stands for itself.
///
/// ```
/// use mongo_core::TextPattern;
///
/// assert!(TextPattern::new("report*").matches("reports of today") && !TextPattern::new("report").matches("reports"));
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct TextPattern {
    text: String,
    /// The literal runs between the stars: one more than there are stars.
    literals: Vec<String>,
}

impl TextPattern {
    /// Reads a pattern; every text is one.
    pub fn new(text: &str) -> Self {
        let mut literals = vec![];
        let mut literal = String::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match c {
                '*' => literals.push(std::mem::take(&mut literal)),
                '\\' => match chars.next() {
                    Some(escaped @ ('*' | '\\')) => literal.push(escaped),
                    // A name may hold a backslash: one that escapes nothing stands for itself.
                    other => literal.extend(std::iter::once('\\').chain(other)),
                },
                other => literal.push(other),
            }
        }
        literals.push(literal);
        Self { text: text.to_owned(), literals }
    }

    /// Whether it matches all of this text.
    pub fn matches(&self, text: &str) -> bool {
        self.captures(text).is_some()
    }

    /// What each star stands for, leftmost shortest first; `None` if it does not match.
    pub(crate) fn captures<'a>(&self, text: &'a str) -> Option<Vec<&'a str>> {
        let (first, rest) = self.literals.split_first()?;
        let mut remaining = text.strip_prefix(first.as_str())?;
        let Some((last, middle)) = rest.split_last() else {
            return remaining.is_empty().then(Vec::new);
        };
        let mut captures = Vec::with_capacity(rest.len());
        for literal in middle {
            let at = remaining.find(literal.as_str())?;
            captures.push(&remaining[..at]);
            remaining = &remaining[at + literal.len()..];
        }
        captures.push(remaining.strip_suffix(last.as_str())?);
        Some(captures)
    }

    /// Whether it matches a text that begins with this, and goes on in some way.
    pub(crate) fn may_begin(&self, text: &str) -> bool {
        !self.after(text).is_empty()
    }

    /// Whether it matches every text that begins with this.
    pub(crate) fn matches_whatever_follows(&self, text: &str) -> bool {
        let last = self.literals.len() - 1;
        // Behind the last star, where nothing must follow.
        self.literals.last().is_some_and(String::is_empty) && last > 0 && self.after(text).contains(&(last, 0))
    }

    /// Where in the pattern one can be after this text: in which literal, and after so many bytes of it. At the beginning of any but the first
    /// there is a star before, which may go on.
    fn after(&self, text: &str) -> Vec<(usize, usize)> {
        let mut places = Vec::new();
        self.enter(0, &mut places);
        for c in text.chars() {
            let mut next = Vec::new();
            for (literal, at) in places {
                if self.literals[literal][at..].starts_with(c) {
                    let at = at + c.len_utf8();
                    if at == self.literals[literal].len() {
                        next.push((literal, at));
                        self.enter(literal + 1, &mut next);
                    } else {
                        next.push((literal, at));
                    }
                }
                if literal > 0 && at == 0 {
                    self.enter(literal, &mut next);
                }
            }
            next.sort_unstable();
            next.dedup();
            places = next;
        }
        places
    }

    /// Comes to the beginning of a literal, and of those behind it if there is nothing in it.
    fn enter(&self, from: usize, places: &mut Vec<(usize, usize)>) {
        for literal in from..self.literals.len() {
            places.push((literal, 0));
            if !self.literals[literal].is_empty() {
                return;
            }
        }
    }

    /// The literal runs between the stars.
    pub(crate) fn literals(&self) -> &[String] {
        &self.literals
    }

    /// What comes before the first star.
    pub(crate) fn first(&self) -> &str {
        self.literals.first().map_or("", String::as_str)
    }

    pub(crate) fn stars(&self) -> usize {
        self.literals.len() - 1
    }

    /// Whether this character must be in whatever matches.
    pub(crate) fn has_literal(&self, c: char) -> bool {
        self.literals.iter().any(|literal| literal.contains(c))
    }
}

impl fmt::Display for TextPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for TextPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_may_follow_is_what_a_match_shows(pattern in "[ab.*]{0,6}", begins in "[ab.]{0,4}", follows in "[ab.]{0,4}") {
            let pattern = TextPattern::new(&pattern);
            let matches = pattern.matches(&format!("{begins}{follows}"));
            prop_assert!(!matches || pattern.may_begin(&begins));
            prop_assert!(matches || !pattern.matches_whatever_follows(&begins));
        }

        #[test]
        fn what_may_begin_can_be_gone_on_with(pattern in "[ab*]{0,5}", begins in "[ab]{0,3}") {
            let pattern = TextPattern::new(&pattern);
            // Each literal once more is enough to come to the end.
            let ends: Vec<String> = pattern.literals.iter().flat_map(|literal| (0..=literal.len()).map(|at| literal[at..].to_owned())).collect();
            let shown = (0..pattern.literals.len()).any(|from| {
                let rest = pattern.literals[from..].iter().skip(1).cloned().collect::<String>();
                ends.iter().any(|end| pattern.matches(&format!("{begins}{end}{rest}")))
            });
            prop_assert_eq!(pattern.may_begin(&begins), shown);
        }
    }

    #[test]
    fn patterns_begin_as_they_say() {
        let pattern = TextPattern::new("sh*.orders");
        assert!(pattern.may_begin("shop.") && pattern.may_begin("s") && !pattern.may_begin("x"));
        assert!(!pattern.matches_whatever_follows("shop."));
        assert!(TextPattern::new("shop.*").matches_whatever_follows("shop."));
        assert!(TextPattern::new("*").matches_whatever_follows("shop."));
        assert!(!TextPattern::new("shop.").matches_whatever_follows("shop."));
    }
}
