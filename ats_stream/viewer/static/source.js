// How OpenSeadragon finds the tiles of a picture: each resolution has a size of its own, as the server states
// it, which need not be a power of two. Lengths are in pixels of the image's level 0.

export function tileSource(resolutions, urlOf) {
  const finest = resolutions[resolutions.length - 1];
  const width = finest.width * finest.scaleX;
  const height = finest.height * finest.scaleY;
  const source = new OpenSeadragon.TileSource({
    width, height, tileSize: finest.tile, minLevel: 0, maxLevel: resolutions.length - 1,
  });
  const size = (level, column, row) => {
    const one = resolutions[level];
    return [Math.min(one.tile, one.width - column * one.tile), Math.min(one.tile, one.height - row * one.tile)];
  };
  const tileAt = (length, tile, count) => Math.min(Math.max(Math.floor(length / tile), 0), count - 1);

  source.getLevelScale = (level) => 1 / resolutions[level].scaleX;
  source.getNumTiles = (level) => new OpenSeadragon.Point(resolutions[level].columns, resolutions[level].rows);
  source.getTileAtPoint = (level, point) => {
    const one = resolutions[level];
    return new OpenSeadragon.Point(
      tileAt((point.x * width) / one.scaleX, one.tile, one.columns),
      tileAt((point.y * width) / one.scaleY, one.tile, one.rows),
    );
  };
  source.getTileBounds = (level, column, row, isSource) => {
    const one = resolutions[level];
    const [wide, high] = size(level, column, row);
    if (isSource) return new OpenSeadragon.Rect(0, 0, wide, high);
    // both axes are in units of the width
    const [x, y] = [one.scaleX / width, one.scaleY / width];
    return new OpenSeadragon.Rect(column * one.tile * x, row * one.tile * y, wide * x, high * y);
  };
  source.getTileUrl = (level, column, row) => urlOf(level, column, row);
  return source;
}
