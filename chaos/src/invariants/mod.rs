//! What must hold under every fault, one file for each invariant of docs/architecture.md: a whole history in,
//! violations out. Must never do IO, nor need anything but what clients saw.

mod i10_device_order;
mod i1_lost;
mod i2_dense;
mod i3_twice;
mod i4_same;
mod i5_cursors;
mod i6_own_writes;
mod i7_access;
mod i9_linearizable;
mod rising;
#[cfg(test)]
mod story;
#[cfg(test)]
mod story_tests;

use crate::oracle::{Case, Violations};

/// Looks at a whole history and adds what it finds.
pub type Check = fn(&Case<'_>, &mut Violations);

/// Every invariant, by its name.
pub const ALL: &[(&str, Check)] = &[
    ("I1", i1_lost::check),
    ("I2", i2_dense::check),
    ("I3", i3_twice::check),
    ("I4", i4_same::check),
    ("I5", i5_cursors::check),
    ("I6", i6_own_writes::check),
    ("I7", i7_access::check),
    ("I9", i9_linearizable::check),
    ("I10", i10_device_order::check),
];
