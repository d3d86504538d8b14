//! OP_QUERY: the first hello of some drivers, and of all that are older than OP_MSG.

use std::ops::Range;

use super::{Malformed, bson_scan, header::HEADER};

/// Only this is asked in the old way.
const COMMANDS_OF_ADMIN: &[u8] = b"admin.$cmd\0";

/// Checks a query as a whole, and says where its command is in the message.
pub(crate) fn check(message: &[u8]) -> Result<Range<usize>, Malformed> {
    // Flags, the name, how many to skip, how many to return.
    let name = HEADER + 4;
    let document = name + COMMANDS_OF_ADMIN.len() + 8;
    if message.get(name..name + COMMANDS_OF_ADMIN.len()) != Some(COMMANDS_OF_ADMIN) {
        return Err(Malformed::Opcode);
    }
    bson_scan::check(message.get(document..).ok_or(Malformed::Bounds)?)?;
    Ok(document..message.len())
}
