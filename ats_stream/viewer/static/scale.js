// The scale bar: the longest of 1, 2 or 5 times a power of ten that fits.

const UNITS = [[1e4, "cm"], [1e3, "mm"], [1, "\u00b5m"], [1e-3, "nm"]];

// Length in screen pixels and label of a bar of at most maxPx, where a screen pixel is umPerPx micrometres.
export function scaleBar(umPerPx, maxPx) {
  const limit = umPerPx * maxPx;
  if (!(limit > 0) || !Number.isFinite(limit)) return null;
  const power = 10 ** Math.floor(Math.log10(limit));
  const um = power * ([5, 2].find((step) => step * power <= limit) ?? 1);
  const [size, unit] = UNITS.find(([one]) => um >= one * 0.999) ?? UNITS[UNITS.length - 1];
  return { px: um / umPerPx, label: `${Number((um / size).toPrecision(3))} ${unit}` };
}
