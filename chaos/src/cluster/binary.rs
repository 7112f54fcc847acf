//! Where the binary under test is. Must never take another one than was named: a run on the wrong binary proves nothing.

use std::path::PathBuf;

use super::ClusterError;

/// The binary named by `STENTOR_BIN`; without that, the one that was built with this program: beside it, or beside the
/// folder of test programs.
///
/// # Errors
/// [`ClusterError::NoBinary`] if there is none.
pub fn find() -> Result<PathBuf, ClusterError> {
    if let Some(named) = std::env::var_os("STENTOR_BIN").map(PathBuf::from) {
        return if named.is_file() { Ok(named) } else { Err(ClusterError::NoBinary(named)) };
    }
    let own = std::env::current_exe().map_err(ClusterError::io("where this program is"))?;
    let folders = own.ancestors().skip(1).take(2);
    let candidates: Vec<PathBuf> = folders.map(|folder| folder.join("stentor")).collect();
    let found = candidates.iter().find(|path| path.is_file()).cloned();
    found.ok_or_else(|| ClusterError::NoBinary(candidates.into_iter().next().unwrap_or(own)))
}
