//! Prometheus text, written by hand: counters and gauges are plain atomics of whoever owns them, and this file turns them into lines.
//!
//! Promises. M1: one `# HELP` and `# TYPE` pair per name, before its samples, as the format demands. M2: label values are escaped.
//! M3: names follow etcd's where they mean the same, so existing dashboards work.
//! Not promised. No registry: a page is one walk over the owners, and its figures are not one moment's.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// One page of metrics under construction.
#[derive(Default)]
pub struct Exposition {
    text: String,
    /// The name whose head was written last: samples of one name follow each other.
    last: &'static str,
}

impl Exposition {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn counter(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], value: f64) {
        self.head(name, help, "counter");
        self.sample(name, "", labels, None, value);
    }

    pub fn gauge(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], value: f64) {
        self.head(name, help, "gauge");
        self.sample(name, "", labels, None, value);
    }

    /// A histogram from bucket counts that are not yet cumulative: one per bound, then one for everything above.
    pub fn histogram(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], figures: &HistogramFigures) {
        self.head(name, help, "histogram");
        let mut total = 0_u64;
        for (bound, count) in figures.bounds.iter().zip(&figures.counts) {
            total += count;
            self.sample(name, "_bucket", labels, Some(&bound.to_string()), total as f64);
        }
        total += figures.counts.get(figures.bounds.len()).copied().unwrap_or(0);
        self.sample(name, "_bucket", labels, Some("+Inf"), total as f64);
        self.sample(name, "_sum", labels, None, figures.sum);
        self.sample(name, "_count", labels, None, total as f64);
    }

    pub fn into_text(self) -> String {
        self.text
    }

    fn head(&mut self, name: &'static str, help: &str, kind: &str) {
        if self.last == name {
            return;
        }
        self.last = name;
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a `String` cannot fail; so below.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, suffix: &str, labels: &[(&str, &str)], le: Option<&str>, value: f64) {
        self.text.push_str(name);
        self.text.push_str(suffix);
        let mut separator = '{';
        for (label, value) in labels.iter().copied().chain(le.map(|bound| ("le", bound))) {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{separator}{label}=\"{value}\"");
            separator = ',';
        }
        if separator == ',' {
            self.text.push('}');
        }
        // `{}` prints a whole f64 without a fraction, and neither form has an exponent: both are valid here.
        let _ = writeln!(self.text, " {value}");
    }
}

/// What a histogram shows; `counts` has one more entry than `bounds`.
pub struct HistogramFigures {
    pub bounds: Vec<f64>,
    pub counts: Vec<u64>,
    pub sum: f64,
}

/// A counter that many threads add to.
#[derive(Default, Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Used as a gauge: what was added earlier ends.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }
}

/// A histogram of durations that many threads record into.
#[derive(Debug)]
pub struct DurationHistogram {
    /// Upper bounds in seconds, ascending.
    bounds: &'static [f64],
    counts: Box<[AtomicU64]>,
    sum_nanos: AtomicU64,
}

impl DurationHistogram {
    pub fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum_nanos: AtomicU64::new(0) }
    }

    pub fn record(&self, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    pub fn figures(&self) -> HistogramFigures {
        HistogramFigures {
            bounds: self.bounds.to_vec(),
            counts: self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect(),
            sum: Duration::from_nanos(self.sum_nanos.load(Ordering::Relaxed)).as_secs_f64(),
        }
    }
}

/// What `/proc` tells of this process, under the names of the Prometheus client libraries. Silent where there is no `/proc`.
pub(crate) fn process(out: &mut Exposition) {
    let ticks = rustix::param::clock_ticks_per_second() as f64;
    let page = rustix::param::page_size() as f64;
    if let Some(fields) = stat_fields() {
        // Numbered from the state, the third field of proc(5): utime 14, stime 15, starttime 22, vsize 23, rss 24.
        let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
        let cpu = (field(14) + field(15)) / ticks;
        out.counter("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.", &[], cpu);
        out.gauge("process_resident_memory_bytes", "Resident memory size in bytes.", &[], field(24) * page);
        out.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", &[], field(23));
        if let Some(boot) = boot_seconds() {
            let start = boot + field(22) / ticks;
            let help = "Start time of the process since unix epoch in seconds.";
            out.gauge("process_start_time_seconds", help, &[], start);
        }
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        // The listing itself is open while it is counted.
        let open = files.count().saturating_sub(1);
        out.gauge("process_open_fds", "Number of open file descriptors.", &[], open as f64);
    }
    if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        out.gauge("process_max_fds", "Maximum number of open file descriptors.", &[], limit as f64);
    }
}

fn stat_fields() -> Option<Vec<String>> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The command name stands in brackets and may hold spaces and brackets itself.
    let (_, rest) = stat.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn boot_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_head_per_name_and_escaped_labels() {
        let mut out = Exposition::new();
        out.counter("a_total", "first", &[("who", "x\"y\\z")], 1.0);
        out.counter("a_total", "first", &[("who", "b")], 2.5);
        out.gauge("g", "second", &[], 3.0);
        let expected = "# HELP a_total first\n# TYPE a_total counter\na_total{who=\"x\\\"y\\\\z\"} 1\na_total{who=\"b\"} 2.5\n\
                        # HELP g second\n# TYPE g gauge\ng 3\n";
        assert_eq!(out.into_text(), expected);
    }

    #[test]
    fn buckets_are_cumulative() {
        let histogram = DurationHistogram::new(&[0.001, 0.01]);
        for millis in [1, 5, 50] {
            histogram.record(Duration::from_millis(millis));
        }
        let mut out = Exposition::new();
        out.histogram("h", "help", &[], &histogram.figures());
        let text = out.into_text();
        for line in ["h_bucket{le=\"0.001\"} 1", "h_bucket{le=\"0.01\"} 2", "h_bucket{le=\"+Inf\"} 3", "h_count 3"] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn this_process_has_memory() {
        let mut out = Exposition::new();
        process(&mut out);
        assert!(out.into_text().contains("process_resident_memory_bytes"));
    }
}
