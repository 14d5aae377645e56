//! Hit rates over pool sizes, as an SVG.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use plotters::prelude::*;

use super::{GIB, Run};

const SIZE: (u32, u32) = (720, 440);

/// Draws one line per policy; the file is written whole or not at all.
pub(super) fn draw(path: &Path, title: &str, runs: &[Run]) -> anyhow::Result<()> {
    let mut svg = String::new();
    // The library's errors borrow the canvas, so that they cannot be passed on.
    chart(&mut svg, title, runs).map_err(|problem| anyhow!(problem))?;
    std::fs::write(path, svg).context("the file cannot be written")
}

fn chart(svg: &mut String, title: &str, runs: &[Run]) -> Result<(), String> {
    let sizes = runs.iter().map(|run| run.size_bytes as f64 / GIB);
    let (low, high) = sizes.fold((f64::INFINITY, 0.0_f64), |(low, high), size| {
        (low.min(size), high.max(size))
    });
    let best = runs
        .iter()
        .map(|run| 100.0 * run.result.token_hit_rate())
        .fold(0.0, f64::max);
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(
            (low * 0.95..high * 1.05).log_scale(),
            0.0..(best * 1.1).clamp(1.0, 100.0),
        )
        .map_err(|error| failed(&error))?;
    chart
        .configure_mesh()
        .x_desc("pool, GiB")
        .y_desc("hit rate, % of tokens")
        .x_label_formatter(&|size| {
            format!("{size:.3}")
                .trim_end_matches('0')
                .trim_end_matches('.')
                .to_owned()
        })
        .y_label_formatter(&|rate| format!("{rate:.0}"))
        .draw()
        .map_err(|error| failed(&error))?;
    let mut policies: Vec<&str> = runs.iter().map(|run| &*run.policy).collect();
    policies.dedup();
    for (nth, policy) in policies.into_iter().enumerate() {
        let color = Palette99::pick(nth).to_rgba();
        let points: Vec<(f64, f64)> = runs
            .iter()
            .filter(|run| run.policy == policy)
            .map(|run| {
                let size = run.size_bytes as f64 / GIB;
                (size, 100.0 * run.result.token_hit_rate())
            })
            .collect();
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))
            .map_err(|error| failed(&error))?
            .label(policy)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}
