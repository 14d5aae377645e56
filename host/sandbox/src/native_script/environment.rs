//! The variables that a script sees: the plugin contract, what any program needs to run,
//! and what the configuration names. Nothing else of the server's own environment.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
};

use super::error::ScriptError;

/// Passed on when the server has them: a program needs them to find others, to encode text
/// and to know where it may write.
const ALWAYS_PASSED: [&str; 5] = ["PATH", "HOME", "LANG", "LC_ALL", "TMPDIR"];

/// Where programs are looked for when the server has no `PATH` itself.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The kernel refuses to start a program with a longer `NAME=value` (`MAX_ARG_STRLEN`, 32
/// pages with the final zero byte).
const MAX_VARIABLE_BYTES: usize = 32 * 4096 - 1;

/// Picks from the server's environment what scripts may see: `PATH`, `HOME`, `LANG`,
/// `LC_ALL`, `TMPDIR` and the `granted` names.
pub fn passed_on(
    server: impl IntoIterator<Item = (OsString, OsString)>,
    granted: &[String],
) -> BTreeMap<OsString, OsString> {
    let is_passed = |name: &OsStr| {
        ALWAYS_PASSED.iter().any(|passed| name == *passed)
            || granted.iter().any(|granted| name == granted.as_str())
    };
    server
        .into_iter()
        .filter(|(name, _)| is_passed(name))
        .collect()
}

/// All variables of a script; the contract's win over those passed on.
///
/// Also sets `PYTHONUNBUFFERED=1`, as LMCache does for scripts of every kind, since Bash
/// plugins start Python too.
pub(super) fn build(
    passed_on: &BTreeMap<OsString, OsString>,
    contract: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<BTreeMap<OsString, OsString>, ScriptError> {
    let mut variables = passed_on.clone();
    variables
        .entry("PATH".into())
        .or_insert_with(|| DEFAULT_PATH.into());
    variables.extend(contract);
    variables.insert("PYTHONUNBUFFERED".into(), "1".into());
    for (name, value) in &variables {
        let shown = || name.to_string_lossy().into_owned();
        let is_name = !name.is_empty() && !name.as_bytes().contains(&b'=');
        if !is_name || name.as_bytes().contains(&0) || value.as_bytes().contains(&0) {
            return Err(ScriptError::Variable { name: shown() });
        }
        let bytes = name.len() + 1 + value.len();
        if bytes > MAX_VARIABLE_BYTES {
            return Err(ScriptError::VariableTooLong {
                name: shown(),
                bytes,
                limit: MAX_VARIABLE_BYTES,
            });
        }
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        reason = "a test fails by panicking"
    )]

    use super::*;

    fn pairs(list: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        list.iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect()
    }

    #[test]
    fn only_named_variables_are_passed_on() {
        let server = pairs(&[
            ("PATH", "/bin"),
            ("HOME", "/h"),
            ("LANG", "C"),
            ("LC_ALL", "C"),
            ("TMPDIR", "/t"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
            ("LC_CTYPE", "C"),
            ("HTTP_PROXY", "p"),
            ("path", "x"),
        ]);
        let passed = passed_on(server, &["HTTP_PROXY".to_owned(), "ABSENT".to_owned()]);
        let names: Vec<_> = passed.keys().map(|name| name.to_str().unwrap()).collect();
        assert_eq!(
            names,
            ["HOME", "HTTP_PROXY", "LANG", "LC_ALL", "PATH", "TMPDIR"]
        );
    }

    #[test]
    fn the_contract_wins_and_path_is_never_missing() {
        let passed = passed_on(pairs(&[("LMCACHE_PLUGIN_ROLE", "x")]), &[]);
        let built = build(&passed, pairs(&[("LMCACHE_PLUGIN_ROLE", "")])).unwrap();
        let expected = pairs(&[
            ("LMCACHE_PLUGIN_ROLE", ""),
            ("PATH", DEFAULT_PATH),
            ("PYTHONUNBUFFERED", "1"),
        ]);
        assert_eq!(built.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_the_kernel_would_refuse_is_refused_by_name() {
        let passed = BTreeMap::new();
        let longest = "x".repeat(MAX_VARIABLE_BYTES - "CONFIG=".len());
        assert!(build(&passed, pairs(&[("CONFIG", &longest)])).is_ok());
        let too_long = longest + "x";
        for (name, value) in [
            ("CONFIG", too_long.as_str()),
            ("A=B", ""),
            ("", "x"),
            ("NUL", "a\0b"),
        ] {
            let error = build(&passed, pairs(&[(name, value)])).unwrap_err();
            assert!(error.to_string().contains(&format!("`{name}`")), "{error}");
        }
    }
}
