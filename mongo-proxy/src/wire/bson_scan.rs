//! Checks that a document is one, before anybody parses it.
//!
//! What is checked is what a parser could be led astray by: that every length lies within what it is in, that every document and every text ends where it says, that types are known and documents are not within
//! each other without end. That text is UTF-8 is left to the server.

use super::Malformed;

/// So many documents may be within each other below the outermost, as in the server.
pub(crate) const DEEPEST: usize = 200;
/// The longest document of a command or a reply: sixteen megabytes, and room for what is around them.
pub(crate) const LONGEST_DOCUMENT: usize = (16 << 20) + (16 << 10);
/// Its length and its end.
const SHORTEST_DOCUMENT: usize = 5;

/// The length that a document says it has, if that can be. `None` as long as too little of it is there.
pub(crate) fn length_of(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(length) = bytes.first_chunk::<4>() else { return Ok(None) };
    let length = usize::try_from(i32::from_le_bytes(*length)).map_err(|_| Malformed::Bounds)?;
    if !(SHORTEST_DOCUMENT..=LONGEST_DOCUMENT).contains(&length) {
        return Err(Malformed::Bounds);
    }
    Ok(Some(length))
}

/// Checks that `bytes` are a document, and nothing else.
pub(crate) fn check(bytes: &[u8]) -> Result<(), Malformed> {
    if length_of(bytes)? != Some(bytes.len()) {
        return Err(Malformed::Bounds);
    }
    let mut scan = Scan { bytes, at: 4, end: bytes.len(), outer: Vec::new() };
    while !scan.element()? {}
    // The outermost ended where all ends.
    Ok(())
}

struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where the innermost document that is open ends.
    end: usize,
    /// Where those end that it is in, the outermost first.
    outer: Vec<usize>,
}

impl Scan<'_> {
    /// Reads a field, or the end of the innermost document. Whether it was that of the outermost.
    fn element(&mut self) -> Result<bool, Malformed> {
        let [kind] = self.take(self.end)?;
        if kind == 0 {
            if self.at != self.end {
                return Err(Malformed::Bounds);
            }
            let Some(outer) = self.outer.pop() else { return Ok(true) };
            self.end = outer;
            return Ok(false);
        }
        // The last byte of a document is its own.
        let within = self.end - 1;
        self.name(within)?;
        match kind {
            // Double, date, timestamp, 64-bit integer.
            0x01 | 0x09 | 0x11 | 0x12 => self.skip(8, within),
            // Text, code, symbol.
            0x02 | 0x0d | 0x0e => self.text(within),
            0x03 | 0x04 => self.open(within),
            0x05 => self.binary(within),
            // Undefined, null, the least and the greatest key.
            0x06 | 0x0a | 0x7f | 0xff => Ok(()),
            // An identifier.
            0x07 => self.skip(12, within),
            0x08 => match self.take(within)? {
                [0 | 1] => Ok(()),
                _ => Err(Malformed::Bson),
            },
            // A regular expression and its options.
            0x0b => {
                self.name(within)?;
                self.name(within)
            }
            // A namespace and an identifier.
            0x0c => {
                self.text(within)?;
                self.skip(12, within)
            }
            0x0f => self.code_with_scope(within),
            0x10 => self.skip(4, within),
            0x13 => self.skip(16, within),
            _ => Err(Malformed::Bson),
        }?;
        Ok(false)
    }

    fn take<const N: usize>(&mut self, within: usize) -> Result<[u8; N], Malformed> {
        let from = self.at;
        self.skip(N, within)?;
        self.bytes[from..].first_chunk().copied().ok_or(Malformed::Bounds)
    }

    fn skip(&mut self, bytes: usize, within: usize) -> Result<(), Malformed> {
        self.at = self.at.checked_add(bytes).filter(|at| *at <= within).ok_or(Malformed::Bounds)?;
        Ok(())
    }

    fn length(&mut self, within: usize) -> Result<usize, Malformed> {
        usize::try_from(i32::from_le_bytes(self.take(within)?)).map_err(|_| Malformed::Bounds)
    }

    /// Text until a zero.
    fn name(&mut self, within: usize) -> Result<(), Malformed> {
        let rest = self.bytes.get(self.at..within).ok_or(Malformed::Bounds)?;
        let length = rest.iter().position(|byte| *byte == 0).ok_or(Malformed::Bounds)?;
        self.skip(length + 1, within)
    }

    /// Text with a length and a zero that is counted.
    fn text(&mut self, within: usize) -> Result<(), Malformed> {
        let length = self.length(within)?;
        self.skip(length.checked_sub(1).ok_or(Malformed::Bounds)?, within)?;
        if self.take(within)? == [0] { Ok(()) } else { Err(Malformed::Bson) }
    }

    fn binary(&mut self, within: usize) -> Result<(), Malformed> {
        let length = self.length(within)?;
        let [subtype] = self.take(within)?;
        let from = self.at;
        self.skip(length, within)?;
        // The old subtype has its length once more.
        if subtype == 0x02 {
            let inner = self.bytes[from..self.at].first_chunk::<4>().ok_or(Malformed::Bson)?;
            if usize::try_from(i32::from_le_bytes(*inner)) != Ok(length - 4) {
                return Err(Malformed::Bson);
            }
        }
        Ok(())
    }

    /// A document or an array.
    fn open(&mut self, within: usize) -> Result<(), Malformed> {
        let from = self.at;
        let length = self.length(within)?;
        let end =
            from.checked_add(length).filter(|end| length >= SHORTEST_DOCUMENT && *end <= within).ok_or(Malformed::Bounds)?;
        if self.outer.len() >= DEEPEST {
            return Err(Malformed::Depth);
        }
        self.outer.push(self.end);
        self.end = end;
        Ok(())
    }

    /// A length of it all, text, and a document that ends where all of it does.
    fn code_with_scope(&mut self, within: usize) -> Result<(), Malformed> {
        let from = self.at;
        let length = self.length(within)?;
        let end = from.checked_add(length).filter(|end| *end <= within).ok_or(Malformed::Bounds)?;
        self.text(end)?;
        self.open(end)?;
        if self.end == end { Ok(()) } else { Err(Malformed::Bounds) }
    }
}
